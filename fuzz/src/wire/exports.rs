//! The exports of the server under test: one that has everything, one that is read-only, and one that cannot be opened.

use proto::server::{Directory, ExportId, Listing, Refusal};
use proto::wire::{BlockSizes, ExportInfo, MetaContext, ReplyStyle, TransmissionFlags};

/// The size of every export in bytes.
pub(super) const EXPORT_BYTES: u64 = (1 << 20) + 5;

pub(super) struct Exports;

const NAMES: [&str; 3] = ["disk0", "größe", "broken"];

/// The kind of replies that a byte of an input chooses: bit 3 extended headers, else bit 0 structured replies.
pub(super) const fn style(choice: u8) -> ReplyStyle {
    match choice & 9 {
        0 => ReplyStyle::Simple,
        1 => ReplyStyle::Structured,
        _ => ReplyStyle::Extended,
    }
}

/// What an export of this number can do.
pub(super) fn flags(export: ExportId) -> TransmissionFlags {
    use TransmissionFlags as Can;
    let all = Can::HAS_FLAGS
        .with(Can::SEND_FLUSH)
        .with(Can::SEND_FUA)
        .with(Can::SEND_TRIM)
        .with(Can::SEND_WRITE_ZEROES)
        .with(Can::SEND_FAST_ZERO)
        .with(Can::SEND_CACHE)
        .with(Can::CAN_MULTI_CONN);
    all.with_if(export.0 == 1, Can::READ_ONLY)
}

/// Every context that the client under test may want, and some that it never does.
pub(super) fn contexts() -> Vec<MetaContext> {
    let bitmap = |name: &str| MetaContext::DirtyBitmap(name.to_owned());
    vec![MetaContext::Allocation, MetaContext::Depth, bitmap("restore"), bitmap("b 1")]
}

impl Directory for Exports {
    fn list(&self) -> Vec<Listing> {
        let listing = |name: &&str| Listing { name: (*name).to_owned(), description: format!("the {name}") };
        NAMES.iter().map(listing).collect()
    }

    fn find(&self, name: &str) -> Option<ExportId> {
        let wanted = if name.is_empty() { NAMES[0] } else { name };
        NAMES.iter().position(|name| *name == wanted).map(ExportId)
    }

    fn why_absent(&self, name: &str) -> Option<String> {
        name.starts_with('o').then(|| "it is no more".to_owned())
    }

    fn contexts(&self, export: ExportId) -> Vec<MetaContext> {
        contexts().into_iter().skip(export.0).collect()
    }

    fn describe(&self, export: ExportId) -> Result<ExportInfo, Refusal> {
        if export.0 == 2 {
            return Err(Refusal::Unavailable);
        }
        let name = NAMES[export.0].to_owned();
        let description = format!("the {name}");
        let block_sizes = BlockSizes { preferred: 64 << 10, ..BlockSizes::DEFAULT };
        Ok(ExportInfo { name, description, size: EXPORT_BYTES, flags: flags(export), block_sizes })
    }
}
