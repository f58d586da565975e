//! Cutting the power at places of a log: the images, the resumption on them, and the comparison.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;

use block::sim::{Executor, Rng, SECTOR, SimDisk, SimOptions};

use super::recorder::{Event, Place, Recorded};
use super::{Backup, DISK, ID, LOG_PAGES, parts};
use crate::live::journal::JournalLayout;
use crate::live::live_file::{BootId, LiveWords};
use crate::live::session::Session;

const STEPS: u64 = 1_000_000;

/// What all cuts together were about.
#[derive(Debug, Default)]
pub(super) struct Seen {
    cuts: u64,
    /// Writes that began before the cut, that no sync covered, and that were lost in whole or in part.
    pub(super) lost_writes: u64,
    pub(super) kept_unsynced: u64,
    /// Blocks for which a guest had been promised a value.
    pub(super) promised_blocks: u64,
}

/// Bytes that repeat a value.
pub(super) fn stamp(value: u64, len: usize) -> Vec<u8> {
    value.to_le_bytes().into_iter().cycle().take(len).collect()
}

/// Cuts the power at `cuts` places: at the ends of syncs first, then anywhere.
///
/// # Panics
/// Where something that was promised is lost.
pub(super) fn cut(recorded: &Recorded, backup: &Arc<Backup>, cuts: u64, seed: u64) -> Seen {
    let mut rng = Rng::new(seed);
    let events = &recorded.events;
    let is_end_of_sync =
        |at: &usize| matches!(events[*at], Event::Synced { .. } | Event::GuestFlushed { .. });
    let mut at_syncs: Vec<usize> = (recorded.served_from..events.len()).filter(is_end_of_sync).collect();
    rng.shuffle(&mut at_syncs);
    let mut seen = Seen::default();
    for number in 0..cuts {
        let somewhere =
            recorded.served_from + rng.below((events.len() - recorded.served_from) as u64) as usize;
        let at = match at_syncs.get(number as usize / 2) {
            Some(&at) if number % 2 == 0 => at + rng.below(2) as usize,
            _ => somewhere,
        };
        let keep_per_mille = *rng.pick(&[0, 100, 500, 900, 1000]).expect("some");
        let is_torn = rng.chance(500);
        let image = Image::at(&events[..at], keep_per_mille, is_torn, &mut rng, &mut seen);
        if let Err(problem) = compare(image, &events[..at], backup, &mut seen) {
            panic!("cut at event {at} of {}, {keep_per_mille} of 1000 kept: {problem}", events.len());
        }
        seen.cuts += 1;
    }
    seen
}

/// What the two files hold.
struct Image {
    target: Vec<u8>,
    journal: Vec<u8>,
}

impl Image {
    /// After these events: everything that a sync covered, and of the rest what `rng` keeps.
    fn at(events: &[Event], keep_per_mille: u32, is_torn: bool, rng: &mut Rng, seen: &mut Seen) -> Self {
        let stable = stable_writes(events);
        let layout = JournalLayout { log_pages: LOG_PAGES, ..JournalLayout::for_disk(DISK) };
        let mut image =
            Self { target: vec![0; DISK.size as usize], journal: vec![0; layout.len_bytes() as usize] };
        for event in events {
            let Event::Write { place, number, offset, data } = event else { continue };
            let into = match place {
                Place::Target => &mut image.target,
                Place::Journal => &mut image.journal,
            };
            let into = &mut into[*offset as usize..*offset as usize + data.len()];
            if stable.contains(number) {
                into.copy_from_slice(data);
                continue;
            }
            let is_kept = rng.chance(keep_per_mille);
            let mut lost = false;
            for (into, data) in into.chunks_mut(SECTOR as usize).zip(data.chunks(SECTOR as usize)) {
                if if is_torn { rng.chance(keep_per_mille) } else { is_kept } {
                    into.copy_from_slice(data);
                    seen.kept_unsynced += 1;
                } else {
                    lost = true;
                }
            }
            seen.lost_writes += u64::from(lost);
        }
        image
    }
}

/// The writes that ended before a sync of their file began, which ended well.
fn stable_writes(events: &[Event]) -> HashSet<u64> {
    let mut place_of = HashMap::new();
    let mut ended: HashMap<Place, Vec<u64>> = HashMap::new();
    let mut covers: HashMap<u64, (Place, usize)> = HashMap::new();
    let mut stable = HashSet::new();
    let mut upto: HashMap<Place, usize> = HashMap::new();
    for event in events {
        match event {
            Event::Write { place, number, .. } => {
                place_of.insert(*number, *place);
            }
            Event::Written { number, is_stable } => {
                let place = place_of[number];
                ended.entry(place).or_default().push(*number);
                if *is_stable {
                    stable.insert(*number);
                }
            }
            Event::Sync { place, number } => {
                covers.insert(*number, (*place, ended.get(place).map_or(0, Vec::len)));
            }
            Event::Synced { number } => {
                if let Some(&(place, count)) = covers.get(number) {
                    let upto = upto.entry(place).or_default();
                    *upto = count.max(*upto);
                }
            }
            _ => {}
        }
    }
    for (place, count) in upto {
        stable.extend(&ended.get(&place).map_or(&[][..], Vec::as_slice)[..count]);
    }
    stable
}

/// What a block may hold: the last value that was promised, or any that was asked for later.
#[derive(Default)]
struct Block {
    /// In the order in which they were asked for; and when each was answered.
    writes: Vec<(u64, Option<usize>)>,
    promised: Option<usize>,
}

fn promises(events: &[Event]) -> HashMap<u64, Block> {
    let mut blocks: HashMap<u64, Block> = HashMap::new();
    let mut flush_begun: HashMap<u64, usize> = HashMap::new();
    for (at, event) in events.iter().enumerate() {
        match event {
            Event::GuestWrites { block, value } => {
                blocks.entry(*block).or_default().writes.push((*value, None));
            }
            Event::GuestWrote { block, value } => {
                let block = blocks.get_mut(block).expect("it was begun");
                let last = block.writes.last_mut().expect("it was begun");
                assert_eq!(last.0, *value, "one guest a block");
                last.1 = Some(at);
            }
            Event::GuestFlushes { guest } => {
                flush_begun.insert(*guest, at);
            }
            Event::GuestFlushed { guest } => {
                let begun = flush_begun[guest];
                for block in blocks.values_mut() {
                    let is_covered = |(_, ended): &(u64, Option<usize>)| ended.is_some_and(|at| at < begun);
                    block.promised = block.promised.max(block.writes.iter().rposition(is_covered));
                }
            }
            _ => {}
        }
    }
    blocks
}

fn compare(image: Image, events: &[Event], backup: &Arc<Backup>, seen: &mut Seen) -> Result<(), String> {
    let options = |size: usize| SimOptions { max_delay: 0, ..SimOptions::new(size as u64, 1) };
    let target = SimDisk::holding(&image.target, options(image.target.len()));
    let journal = SimDisk::holding(&image.journal, options(image.journal.len()));
    let session = {
        let parts = parts(backup, LiveWords::in_memory(DISK), BootId([0xee; 16]));
        let (target, journal) = (target.clone(), journal.clone());
        Executor::new(1).block_on(STEPS, async move { Session::resume(parts, ID, &target, &journal).await })
    };
    let (session, _) = session.map_err(|error| format!("no start: {error}"))?;
    let device = session.device(Rc::new(target.clone()), Rc::new(journal)).expect("the disks are fit");
    let map = &device.session().map;
    let promises = promises(events);
    let view = target.view();
    for block in 0..map.block_count() {
        let range = map.bytes(&(block..block + 1));
        let (start, end) = (range.start() as usize, range.end() as usize);
        let from_backup = &backup.0[start..end];
        let bytes = if map.v().contains(block) { &view[start..end] } else { from_backup };
        if bytes != from_backup && !map.g().contains(block) {
            return Err(format!("block {block} differs from the backup and is not in the dirty bitmap"));
        }
        let known = promises.get(&block);
        let promised = known.and_then(|block| block.promised);
        seen.promised_blocks += u64::from(promised.is_some());
        let values: Vec<u64> = known
            .iter()
            .flat_map(|block| &block.writes[promised.unwrap_or(0)..])
            .map(|(value, _)| *value)
            .collect();
        for (sector, old) in bytes.chunks(SECTOR as usize).zip(from_backup.chunks(SECTOR as usize)) {
            let is_one_of = values.iter().any(|&value| *sector == stamp(value, sector.len())[..]);
            if !is_one_of && (promised.is_some() || sector != old) {
                let is = u64::from_le_bytes(sector[..8].try_into().expect("eight bytes"));
                return Err(format!(
                    "block {block} holds {is:#x}; promised was write {promised:?} of {:x?}",
                    known.map(|block| &block.writes)
                ));
            }
        }
    }
    Ok(())
}
