//! The ids of many chunks at once.
#![cfg_attr(fuzzing, no_main)]

fuzz::program!("repository_ids", fuzz::repository::ids);
