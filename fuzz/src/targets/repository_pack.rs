//! The end of a pack.
#![cfg_attr(fuzzing, no_main)]

fuzz::program!("repository_pack", fuzz::repository::pack);
