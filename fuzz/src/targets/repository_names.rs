//! Names that users type and that files have.
#![cfg_attr(fuzzing, no_main)]

fuzz::program!("repository_names", fuzz::repository::names);
