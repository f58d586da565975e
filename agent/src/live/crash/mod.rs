//! Crash tests: the production engine on simulated disks, ended at any step, again and again.
//!
//! A *story* is several lives of an agent over one world, all from one seed. In each life the session is made or
//! resumed (and may be cut off in the middle of that), the whole disk is read and compared with what it may
//! hold, and then guests, fill workers and the commit worker run, perhaps among failing devices and an absent
//! source, until the power is cut, the agent is killed, or it is parked. The last life brings everything home,
//! and after one more power cut all of it must be there.
//!
//! Each mistake of [`Mistake`] is made on purpose, and the same stories must find it.
//!
//! `LIFEBOOT_CRASH_SEEDS` sets how many seeds a test runs, `LIFEBOOT_CRASH_FIRST_SEED` the first of them.

mod guest;
mod model;
mod run;
mod world;

use run::{Cut, Place, Story, Tally};

use super::mistakes::Mistake;

/// Seeds of each of the two tests of whole stories.
const SEEDS: u64 = 150;
/// Seeds in which a mistake must show.
const MISTAKE_SEEDS: u64 = 300;

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

fn tell(seed: u64) -> Tally {
    let mut story = Story::new(seed, None, true);
    if let Err(violation) = story.run() {
        panic!("seed {seed}: {violation}");
    }
    story.tally
}

fn tell_all(offset: u64) {
    let first = from_env("LIFEBOOT_CRASH_FIRST_SEED", 0);
    let mut sum = Tally::default();
    for seed in 0..from_env("LIFEBOOT_CRASH_SEEDS", SEEDS) {
        sum.add(tell(first + 2 * seed + offset));
    }
    println!("{sum:?}");
}

#[test]
fn nothing_promised_is_lost_over_many_lives() {
    tell_all(0);
}

#[test]
fn nothing_promised_is_lost_over_many_other_lives() {
    tell_all(1);
}

/// Seeds whose lives are cut at each step in turn.
const STEPPED_SEEDS: u64 = 2;
/// Steps of the work after which a life is cut.
const WORK_STEPS: u64 = 240;
/// Steps of making or resuming a session after which a life is cut; few take longer.
const START_STEPS: u64 = 60;

fn cut_at(seed: u64, cuts: &[Cut]) {
    let mut story = Story::new(seed, None, true);
    let told = cuts.iter().try_for_each(|cut| story.life(Some(*cut))).and_then(|()| story.recover());
    told.unwrap_or_else(|violation| panic!("seed {seed}, {cuts:?}: {violation}"));
}

#[test]
fn nothing_promised_is_lost_whatever_step_of_the_work_is_the_last() {
    for seed in 0..STEPPED_SEEDS {
        for step in 0..WORK_STEPS {
            for by_power in [true, false] {
                cut_at(seed, &[Cut { place: Place::Working(step), by_power }]);
            }
        }
    }
}

#[test]
fn nothing_promised_is_lost_whatever_step_of_a_start_is_the_last() {
    for seed in 0..STEPPED_SEEDS {
        for step in 0..START_STEPS {
            for by_power in [true, false] {
                let start = Cut { place: Place::Starting(step), by_power };
                let work = Cut { place: Place::Working(200), by_power: seed % 2 == 0 };
                cut_at(seed, &[start]);
                cut_at(seed, &[work, start, start]);
            }
        }
    }
}

fn is_caught(mistake: Option<Mistake>, waits_for_the_lock: bool) {
    for seed in 0..MISTAKE_SEEDS {
        if let Err(violation) = Story::new(seed, mistake, waits_for_the_lock).run() {
            println!("caught by seed {seed}: {violation}");
            return;
        }
    }
    panic!("{MISTAKE_SEEDS} seeds did not notice {mistake:?}");
}

macro_rules! mistakes {
    ($($name:ident: $mistake:ident,)*) => {
        $(
            #[test]
            fn $name() {
                is_caught(Some(Mistake::$mistake), true);
            }
        )*
    };
}

mistakes! {
    a_journal_written_before_the_data_is_caught: JournalBeforeData,
    noting_after_the_sync_is_caught: NoteAfterSync,
    a_retried_sync_is_caught: RetriedSync,
    a_mapped_journal_is_caught: MappedJournal,
    a_journal_that_is_not_synced_is_caught: JournalUnsynced,
    a_fill_without_the_hold_is_caught: FillWithoutHold,
    a_trim_rounded_outward_is_caught: TrimRoundedOutward,
    zeroes_assumed_on_a_resumed_session_are_caught: ZeroAssumedOnResume,
    a_block_home_before_its_write_has_ended_is_caught: HomeBeforeCompletion,
    an_acknowledgement_before_the_block_is_home_is_caught: AckBeforeHome,
    a_block_home_before_it_is_marked_as_the_guests_is_caught: HomeBeforeGuest,
    a_live_file_believed_after_a_failed_sync_is_caught: LiveFileAfterFailedSync,
    a_live_file_believed_after_a_reboot_is_caught: LiveFileAfterReboot,
    a_journal_of_another_disk_of_the_same_size_is_caught: ForeignJournal,
    a_read_error_served_as_zeroes_is_caught: ReadErrorAsZeroes,
    a_write_of_part_of_an_absent_block_without_its_fill_is_caught: PartialWithoutFill,
    a_chunk_served_before_its_hash_was_checked_is_caught: ServedUnverified,
}

#[test]
fn writes_of_a_killed_agent_that_land_after_its_successors_are_caught() {
    is_caught(None, false);
}
