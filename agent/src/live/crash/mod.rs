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
//! Everything that the stories are about is counted ([`tally`]), and a million steps must have seen all of it.
//!
//! `LIFEBOOT_CRASH_STEPS=100000000 cargo test --release -p agent --lib live::crash::nothing_promised -- --nocapture`
//! tells stories of so many steps; [`campaign`] has the other variables.

mod campaign;
mod guest;
mod model;
mod saver;
mod source;
mod start;
mod story;
mod tally;
mod world;

use campaign::Campaign;
use story::{Cut, Place, Story};

use super::mistakes::Mistake;

/// Steps that the default run takes; by then everything has happened.
const STEPS: u64 = 1_000_000;
/// Seeds in which a mistake must show.
const MISTAKE_SEEDS: u64 = 3000;

#[test]
fn nothing_promised_is_lost_over_many_lives_and_everything_happened() {
    let campaign = Campaign::from_env(STEPS);
    let tally = campaign.run().unwrap_or_else(|violation| panic!("{violation}"));
    if campaign.steps >= STEPS {
        assert!(tally.missing().is_empty(), "never happened: {:?}", tally.missing());
    }
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
    a_flush_without_a_sync_where_the_map_has_nothing_new_is_caught: SyncOnlyWhereNew,
    a_flush_answered_by_a_sync_that_began_before_it_is_caught: SyncSharedTooLate,
    a_block_called_stable_before_the_journal_is_synced_is_caught: StableBeforeJournal,
    a_write_with_fua_acknowledged_as_any_other_is_caught: FuaUnsynced,
    a_read_after_a_failed_sync_is_caught: ReadAfterFailedSync,
    a_completion_recorded_before_the_target_is_synced_is_caught: CompleteBeforeSync,
    parking_that_does_not_wait_for_changes_is_caught: ParkWithoutWaiting,
    parking_without_a_flush_is_caught: ParkWithoutFlush,
    a_fill_that_looked_before_it_held_is_caught: LookBeforeHold,
    a_fill_of_blocks_that_are_home_is_caught: FillOverHome,
    a_fill_with_what_could_not_be_fetched_is_caught: FailedFetchFilled,
    a_hold_that_is_forgotten_while_others_wait_is_caught: HoldForgotten,
    a_block_home_after_a_failed_write_is_caught: HomeAfterFailedWrite,
    a_block_home_before_it_is_zero_is_caught: HomeBeforeZeroes,
    a_hold_that_ends_before_the_block_is_home_is_caught: HoldEndsBeforeHome,
    a_fast_write_that_is_not_marked_as_the_guests_is_caught: FastWriteUnmarked,
    what_was_decoded_served_instead_of_what_is_home_is_caught: DecodedBeforeMap,
    zeroes_assumed_on_a_target_that_is_not_zero_are_caught: ZeroAssumedOnCreate,
    a_live_file_that_is_not_emptied_is_caught: LiveFileNotEmptied,
    a_live_file_in_use_too_soon_is_caught: LiveFileBegunTooSoon,
    a_resume_that_forgets_what_was_not_committed_is_caught: ResumeForgetsUncommitted,
    a_live_file_taken_for_stable_storage_is_caught: StableFromLiveFile,
    a_resume_that_forgets_the_guests_blocks_is_caught: GuestForgottenOnResume,
    unflushed_writes_that_do_not_count_as_the_guests_are_caught: UnflushedWritesForgotten,
    a_journal_that_says_parked_for_ever_is_caught: ParkedForEver,
    a_checkpoint_over_the_newer_place_is_caught: CheckpointOverNewer,
    a_generation_that_is_not_raised_is_caught: GenerationNotRaised,
    a_log_that_begins_anew_before_the_checkpoint_is_synced_is_caught: CheckpointUnsynced,
    a_checkpoint_taken_for_stable_because_it_was_read_is_caught: ReadTakenForStable,
    a_session_frozen_while_changes_are_under_way_is_caught: FrozenUnderWrites,
    a_view_whose_blocks_are_not_copied_before_a_write_is_caught: OverwrittenInView,
    a_view_whose_copies_are_taken_before_the_target_is_read_is_caught: CopiesTakenFirst,
    a_view_whose_blocks_are_copied_without_its_hold_is_caught: CopiedWithoutHold,
    a_header_before_its_first_checkpoint_is_caught: HeaderFirst,
}

#[test]
fn writes_of_a_killed_agent_that_land_after_its_successors_are_caught() {
    is_caught(None, false);
}
