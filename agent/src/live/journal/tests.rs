//! The journal's bytes: what is written is read, what was torn is not believed, what was damaged is noticed.

use block::sim::{Executor, Faults, Rng, SimDisk, SimOptions};
use proptest::prelude::*;

use std::sync::atomic::AtomicU64;

use super::checkpoint::{CheckpointFlags, decode_checkpoint_header, encode_checkpoint};
use super::format::{BlockRun, Header, JournalLayout, PAGE, SessionId, decode_record, encode_record};
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
            let entry = Entry { runs: &runs, complete: false };
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
    for bits in 54..64 {
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
        // A checkpoint tells of what is home in a chunk whether the guest wrote any of it.
        prop_assert!(g.iter().zip(&said.1).all(|(read, said)| *read || !said));
        for chunk in 0..DISK.chunk_count() as usize {
            let blocks = chunk * 16..(chunk * 16 + 16).min(BLOCKS as usize);
            let (read, said) = (&g[blocks.clone()], &said.1[blocks]);
            prop_assert!(said.contains(&true) || !read.contains(&true), "chunk {} was not written", chunk);
        }
        prop_assert!(g.iter().zip(&p).all(|(guest, home)| *home || !guest));
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
                let entry = Entry { runs: &runs, complete: false };
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
fn a_newer_format_and_an_older_one_are_named_as_such() {
    let mut page = header().encode().unwrap();
    for (version, kind) in [(1, ErrorKind::OlderFormat), (3, ErrorKind::NewerFormat)] {
        page[6] = version;
        page[8] = version;
        let crc = crc32fast::hash(&page[..PAGE - 4]);
        page[PAGE - 4..].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(Header::decode(&page).unwrap_err().kind(), kind);
    }
}

#[test]
fn records_of_another_session_are_not_read() {
    let bytes = encode_record(SessionId([8; 16]), 1, 0, false, &[]);
    assert_eq!(decode_record(&bytes, SESSION, BLOCKS), None);
}

/// Bits of which this says which are set.
fn bits_where(count: u64, is_set: impl Fn(u64) -> bool) -> Box<[AtomicU64]> {
    let words = zeroed_words(words_for(count));
    let bits = Bits::new(&words, count);
    (0..count).filter(|&bit| is_set(bit)).for_each(|bit| {
        bits.set(bit..bit + 1);
    });
    words
}

#[test]
fn a_checkpoint_of_a_whole_disk_is_small_and_the_largest_fits_its_place() {
    let words = |is_set: fn(u64) -> bool| bits_where(BLOCKS, is_set);
    let (all, none, some) = (words(|_| true), words(|_| false), words(|block| block % 3 == 0));
    let encode = |chunk_blocks, p: &[AtomicU64], g: &[AtomicU64]| {
        let (p, g) = (Bits::new(p, BLOCKS), Bits::new(g, BLOCKS));
        encode_checkpoint(SESSION, 1, CheckpointFlags::default(), chunk_blocks, &p, &g).len()
    };
    assert_eq!(encode(16, &all, &none), 2 * PAGE);
    assert_eq!(encode(16, &all, &all), 2 * PAGE);
    for chunk_size in [4096, 8192, 65536, 1 << 20, 1 << 28] {
        let layout = JournalLayout::for_disk(DiskLayout { chunk_size, ..DISK });
        let len = encode(u64::from(chunk_size) / 4096, &some, &words(|block| block % 48 == 0));
        assert!(len <= layout.slot_pages as usize * PAGE, "{len} bytes with chunks of {chunk_size}");
    }
}

#[test]
fn a_journals_room_follows_from_what_can_be_home_in_part() {
    let tib = DiskLayout { size: 1 << 40, chunk_size: 128 << 10 };
    let mib = |layout: JournalLayout| layout.len_bytes() >> 20;
    // 40 GiB of data, and the worst there is.
    assert_eq!(mib(JournalLayout::with_partial(tib, 40 << 13)), 24);
    assert_eq!(mib(JournalLayout::for_disk(tib)), 86);
    for chunk_size in [64 << 10, 4 << 20] {
        let layout =
            JournalLayout::with_partial(DiskLayout { chunk_size, ..tib }, (40 << 30) / u64::from(chunk_size));
        assert!(mib(layout) < 32, "{} MiB with chunks of {chunk_size}", mib(layout));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_checkpoint_says_each_block_that_is_home_and_each_chunk_that_was_written(
        len in 1_u64..20_000,
        chunk in 0_u32..9,
        runs in prop::collection::vec((0_u64..20_000, 1_u64..3000, any::<bool>()), 0..40),
    ) {
        let chunk_blocks = 1_u64 << chunk;
        let disk = DiskLayout { size: len * 4096, chunk_size: 4096 << chunk };
        let [p, g, read_p, read_g] = [(); 4].map(|()| zeroed_words(words_for(len)));
        let [p, g, read_p, read_g] = [&p, &g, &read_p, &read_g].map(|words| Bits::new(words, len));
        for (start, count, guest) in runs {
            let run = start.min(len)..(start + count).min(len);
            p.set(run.clone());
            if guest {
                g.set(run);
            }
        }
        let bytes = encode_checkpoint(SESSION, 6, CheckpointFlags::default(), chunk_blocks, &p, &g);
        let layout = JournalLayout::for_disk(disk);
        prop_assert!(bytes.len() <= layout.slot_pages as usize * PAGE);
        let header = decode_checkpoint_header(&bytes[..PAGE], SESSION, layout).unwrap();
        prop_assert!(header.apply(&bytes[PAGE..PAGE + header.body_len], chunk_blocks, &read_p, &read_g));
        prop_assert_eq!(read_all(&read_p), read_all(&p));
        for chunk in 0..disk.chunk_count() {
            let blocks = chunk * chunk_blocks..((chunk + 1) * chunk_blocks).min(len);
            let is_written = g.any(blocks.clone());
            prop_assert!(blocks.clone().all(|block| read_g.contains(block) == (is_written && p.contains(block))));
        }
    }
}
