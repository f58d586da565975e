//! A journal's checkpoint.
#![cfg_attr(fuzzing, no_main)]

fuzz::program!("journal_checkpoint", fuzz::journal::checkpoint);
