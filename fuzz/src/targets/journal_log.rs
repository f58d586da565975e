//! A journal's log.
#![cfg_attr(fuzzing, no_main)]

fuzz::program!("journal_log", fuzz::journal::log);
