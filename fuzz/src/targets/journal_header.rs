//! A journal's header.
#![cfg_attr(fuzzing, no_main)]

fuzz::program!("journal_header", fuzz::journal::header);
