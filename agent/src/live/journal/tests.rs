//! The journal's bytes: what is written is read, what was torn is not believed, what was damaged is noticed.

use block::sim::{Executor, Faults, Rng, SimDisk, SimOptions};
use proptest::prelude::*;

use super::format::{
    BlockRun, Header, JournalLayout, PAGE, SessionId, decode_record, encode_checkpoint, encode_record,
};
use super::replay::replay_log;
use super::writer::{Entry, Journal};
use crate::live::bits::{Bits, words_for, zeroed_words};
use crate::live::error::{Error, ErrorKind};
use crate::live::source::DiskLayout;

const BLOCKS: u64 = 40_000;
const DISK: DiskLayout = DiskLayout { size: BLOCKS * 4096 - 512, chunk_size: 65536 };
const SESSION: SessionId = SessionId([9; 16]);

fn header() -> Header {
    let journal = JournalLayout { log_pages: 8, ..JournalLayout::for_disk(DISK) };
    Header {
        session: SESSION,
        disk: DISK,
        journal,
        snapshot: "vm@now/disk0".into(),
        target: "disk.raw".into(),
    }
}

/// What a journal says: blocks in `P`, and those of them in `G`.
type Said = (Vec<bool>, Vec<bool>);

fn run() -> impl Strategy<Value = BlockRun> {
    (0..BLOCKS - 300, 1_u32..300, any::<bool>()).prop_map(|(start, len, guest)| BlockRun {
        start,
        len,
        guest,
    })
}

fn empty() -> Said {
    (vec![false; BLOCKS as usize], vec![false; BLOCKS as usize])
}

fn say(said: &mut Said, run: &BlockRun) {
    let blocks = run.start as usize..(run.start + u64::from(run.len)) as usize;
    said.0[blocks.clone()].fill(true);
    if run.guest {
        said.1[blocks].fill(true);
    }
}

fn read_all(bits: &Bits<'_>) -> Vec<bool> {
    (0..bits.len()).map(|bit| bits.contains(bit)).collect()
}

/// Writes a journal that says these groups of runs, each appended at once, and returns its bytes.
fn write_journal(groups: Vec<Vec<BlockRun>>, faults: Faults) -> Result<SimDisk, Error> {
    let mut executor = Executor::new(1);
    let disk = SimDisk::new(SimOptions::new(header().journal.len_bytes(), 1));
    let device = disk.clone();
    executor.block_on(1_000_000, async move {
        let (p_words, g_words) = (zeroed_words(words_for(BLOCKS)), zeroed_words(words_for(BLOCKS)));
        let (p, g) = (Bits::new(&p_words, BLOCKS), Bits::new(&g_words, BLOCKS));
        let mut journal = Journal::create(&device, header(), &p, &g).await?;
        device.set_faults(faults);
        for runs in groups {
            for run in runs.iter().filter(|run| run.guest) {
                g.set(run.start..run.start + u64::from(run.len));
            }
            let on_stable = |runs: &[BlockRun]| {
                for run in runs {
                    p.set(run.start..run.start + u64::from(run.len));
                }
            };
            let entry = Entry { runs: &runs, complete: false, is_synced: true };
            journal.append(&device, entry, &p, &g, on_stable).await?;
        }
        Ok::<_, Error>(())
    })?;
    disk.set_faults(Faults::default());
    Ok(disk)
}

fn read_journal(disk: &SimDisk) -> Result<Said, Error> {
    let mut executor = Executor::new(1);
    let device = disk.clone();
    executor.block_on(1_000_000, async move {
        let header = Journal::read_header(&device).await?;
        let (p_words, g_words) = (zeroed_words(words_for(BLOCKS)), zeroed_words(words_for(BLOCKS)));
        let (p, g) = (Bits::new(&p_words, BLOCKS), Bits::new(&g_words, BLOCKS));
        Journal::open(&device, header, &p, &g).await?;
        Ok((read_all(&p), read_all(&g)))
    })
}

#[test]
fn a_header_that_names_a_disk_larger_than_any_is_damaged() {
    let sound = header().encode().unwrap();
    for bits in 57..64 {
        let mut page = sound.to_vec();
        page[32..40].copy_from_slice(&(1_u64 << bits).to_le_bytes());
        let crc = crc32fast::hash(&page[..PAGE - 4]);
        page[PAGE - 4..].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(Header::decode(&page).unwrap_err().kind(), ErrorKind::Damaged, "2^{bits} bytes");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn what_was_appended_is_read_however_often_the_log_began_anew(
        groups in prop::collection::vec(prop::collection::vec(run(), 0..20), 0..20),
    ) {
        let mut said = empty();
        groups.iter().flatten().for_each(|run| say(&mut said, run));
        let disk = write_journal(groups, Faults::default()).unwrap();
        let (p, g) = read_journal(&disk).unwrap();
        prop_assert!(p == said.0);
        // A checkpoint says of a block that was filled first and written later what is known last.
        prop_assert!(g.iter().zip(&said.1).all(|(read, said)| read == said));
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_no_changed_byte_is_believed(
        runs in prop::collection::vec(run(), 0..400),
        complete: bool,
        at in any::<prop::sample::Index>(),
        flip in 1_u8..,
    ) {
        let bytes = encode_record(SESSION, 3, 7, complete, &runs);
        let record = decode_record(&bytes, SESSION, BLOCKS).unwrap();
        prop_assert_eq!((record.generation, record.sequence, record.complete), (3, 7, complete));
        prop_assert_eq!(&record.runs, &runs);
        let copy = decode_record(&bytes[bytes.len() / 2..], SESSION, BLOCKS).unwrap();
        prop_assert_eq!((&copy.runs, copy.copy), (&runs, 1));
        let mut changed = bytes[..bytes.len() / 2].to_vec();
        changed[at.index(bytes.len() / 2)] ^= flip;
        prop_assert_eq!(decode_record(&changed, SESSION, BLOCKS), None);
    }

    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), PAGE..3 * PAGE)) {
        let _ = Header::decode(&bytes[..PAGE]);
        let _ = decode_record(&bytes, SESSION, BLOCKS);
        let _ = replay_log(&bytes, SESSION, 1, BLOCKS, |_| ());
    }
}

fn some_groups() -> Vec<Vec<BlockRun>> {
    let run = |start, guest| BlockRun { start, len: 5, guest };
    vec![vec![run(10, true), run(100, false)], vec![run(200, true)], vec![run(300, false), run(40, true)]]
}

/// Every byte of the header, of the newest checkpoint's page and body, and of the log, changed.
#[test]
fn each_changed_byte_is_noticed_or_harmless() {
    for groups in [some_groups(), [some_groups(), some_groups()].concat(), Vec::new()] {
        let disk = write_journal(groups, Faults::default()).unwrap();
        let bytes = disk.view();
        let truth = read_journal(&disk).unwrap();
        let (mut noticed, mut harmless) = (0, 0);
        let used = |at: &usize| bytes[at / PAGE * PAGE..][..PAGE].iter().any(|&byte| byte != 0);
        // A page in which nothing is written is tried in a few places.
        let places = (0..bytes.len())
            .filter(|at| used(at) && (at % PAGE < 140 || at % 97 == 0 || at % PAGE > PAGE - 8));
        for at in places {
            disk.poke(at as u64, &[bytes[at] ^ 0x41]);
            match read_journal(&disk) {
                Ok(said) => {
                    assert!(said == truth, "byte {at} changed what the journal says");
                    harmless += 1;
                }
                Err(error) => {
                    assert!(
                        matches!(error.kind(), ErrorKind::Damaged | ErrorKind::NotAJournal),
                        "{at}: {error}"
                    );
                    noticed += 1;
                }
            }
            disk.poke(at as u64, &bytes[at..=at]);
        }
        assert!(noticed > 100, "{noticed} noticed, {harmless} harmless");
    }
}

#[test]
fn a_truncated_journal_is_refused() {
    let disk = write_journal(some_groups(), Faults::default()).unwrap();
    let bytes = disk.view();
    for len in [0, 1, PAGE - 1, PAGE, 3 * PAGE, bytes.len() - PAGE, bytes.len() - 1] {
        let shorter = SimDisk::holding(&bytes[..len], SimOptions::new(0, 1));
        let error = read_journal(&shorter).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Damaged | ErrorKind::NotAJournal), "{len}: {error}");
    }
}

#[test]
fn a_torn_append_loses_nothing_that_was_synced_before() {
    for seed in 0..200 {
        let mut executor = Executor::new(seed);
        let disk = write_journal(some_groups(), Faults::default()).unwrap();
        let truth = read_journal(&disk).unwrap();
        let device = disk.clone();
        executor.spawn(async move {
            let header = Journal::read_header(&device).await.unwrap();
            let (p_words, g_words) = (zeroed_words(words_for(BLOCKS)), zeroed_words(words_for(BLOCKS)));
            let (p, g) = (Bits::new(&p_words, BLOCKS), Bits::new(&g_words, BLOCKS));
            let (mut journal, _) = Journal::open(&device, header, &p, &g).await.unwrap();
            for start in 0..10 {
                let runs: Vec<_> = (0..900)
                    .map(|run| BlockRun { start: start * 4000 + run * 4, len: 1, guest: true })
                    .collect();
                let entry = Entry { runs: &runs, complete: false, is_synced: true };
                if journal.append(&device, entry, &p, &g, |_| ()).await.is_err() {
                    return;
                }
            }
        });
        executor.run(seed);
        drop(executor);
        disk.power_cut(&mut Rng::new(seed));
        let (p, g) = read_journal(&disk).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let keeps =
            |now: &[bool], before: &[bool]| now.iter().zip(before).all(|(now, before)| *now || !before);
        assert!(keeps(&p, &truth.0) && keeps(&g, &truth.1), "seed {seed}");
    }
}

#[test]
fn a_journal_whose_making_was_cut_short_is_whole_or_no_journal() {
    let (mut whole, mut none) = (0, 0);
    for seed in 0..400 {
        let mut executor = Executor::new(seed);
        let disk = SimDisk::new(SimOptions::new(header().journal.len_bytes(), seed));
        let device = disk.clone();
        executor.spawn(async move {
            let words = zeroed_words(words_for(BLOCKS));
            let bits = Bits::new(&words, BLOCKS);
            Journal::create(&device, header(), &bits, &bits).await
        });
        executor.run(seed % 40);
        drop(executor);
        disk.power_cut(&mut Rng::new(seed));
        match read_journal(&disk) {
            Ok(said) => {
                assert!(said == empty(), "seed {seed}");
                whole += 1;
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NotAJournal, "seed {seed}: {error}");
                none += 1;
            }
        }
    }
    assert!(whole > 0 && none > 0, "{whole} whole, {none} none");
}

#[test]
fn a_newer_format_is_named_as_such() {
    let mut page = header().encode().unwrap();
    page[8] = 2;
    let crc = crc32fast::hash(&page[..PAGE - 4]);
    page[PAGE - 4..].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(Header::decode(&page).unwrap_err().kind(), ErrorKind::NewerFormat);
}

#[test]
fn records_of_another_session_are_not_read() {
    let bytes = encode_record(SessionId([8; 16]), 1, 0, false, &[]);
    assert_eq!(decode_record(&bytes, SESSION, BLOCKS), None);
}

#[test]
fn a_checkpoint_of_a_whole_disk_is_small_and_the_largest_fits_its_place() {
    let words = zeroed_words(words_for(BLOCKS));
    let (all, none) = (zeroed_words(words_for(BLOCKS)), Bits::new(&words, BLOCKS));
    let all = Bits::new(&all, BLOCKS);
    all.set(0..BLOCKS);
    assert_eq!(encode_checkpoint(SESSION, 1, Default::default(), &all, &none).len(), 2 * PAGE);
    let (p, g) = (zeroed_words(words_for(BLOCKS)), zeroed_words(words_for(BLOCKS)));
    let (p, g) = (Bits::new(&p, BLOCKS), Bits::new(&g, BLOCKS));
    for block in (0..BLOCKS).step_by(3) {
        p.set(block..(block + 2).min(BLOCKS));
        g.set(block..block + 1);
    }
    let room = header().journal.slot_pages as usize * PAGE;
    assert!(encode_checkpoint(SESSION, 1, Default::default(), &p, &g).len() <= room);
    for (size, most) in [(8 << 30, 18 << 20), (384 << 30, 65 << 20), (1 << 40, 150 << 20)] {
        let layout = JournalLayout::for_disk(DiskLayout { size, chunk_size: 65536 });
        assert!(layout.len_bytes() < most, "{} bytes for a disk of {size}", layout.len_bytes());
    }
}
