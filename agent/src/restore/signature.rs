//! What a block device holds, told by its first bytes: so that a refusal can name what would be lost.

/// How many bytes from the start of a device are looked at.
pub(super) const PROBE_LEN: usize = 1 << 20;

const SIGNATURES: &[(usize, &[u8], &str)] = &[
    (0, b"LUKS\xba\xbe", "a LUKS volume"),
    (0, b"XFSB", "an XFS file system"),
    (0, b"QFI\xfb", "a qcow2 image"),
    (0x200, b"LABELONE", "an LVM physical volume"),
    (0x200, b"EFI PART", "a GPT partition table"),
    (0x1000, b"EFI PART", "a GPT partition table"),
    (0x438, &[0x53, 0xef], "an ext2, ext3 or ext4 file system"),
    (0x1000, &[0xfc, 0x4e, 0x2b, 0xa9], "a RAID member"),
    (0x10040, b"_BHRfS_M", "a btrfs file system"),
    (0xff6, b"SWAPSPACE2", "swap space"),
    (3, b"NTFS    ", "an NTFS file system"),
    (0x52, b"FAT32   ", "a FAT file system"),
    (0x36, b"FAT1", "a FAT file system"),
    (0x1fe, &[0x55, 0xaa], "a boot sector or an MBR partition table"),
];

/// What `head`, the first bytes of a device, shows to be there.
pub(super) fn name(head: &[u8]) -> Option<&'static str> {
    SIGNATURES
        .iter()
        .find(|(offset, bytes, _)| head.get(*offset..).is_some_and(|rest| rest.starts_with(bytes)))
        .map(|(_, _, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_more_telling_signature_wins() {
        let mut head = vec![0; PROBE_LEN];
        assert_eq!(name(&head), None);
        head[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(name(&head), Some("a boot sector or an MBR partition table"));
        head[0x200..0x208].copy_from_slice(b"EFI PART");
        assert_eq!(name(&head), Some("a GPT partition table"));
        assert_eq!(name(&head[..100]), None);
    }
}
