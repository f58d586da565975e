//! A segment of the index.
#![cfg_attr(fuzzing, no_main)]

fuzz::program!("repository_index", fuzz::repository::index);
