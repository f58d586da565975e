//! A node of a disk map.
#![cfg_attr(fuzzing, no_main)]

fuzz::program!("repository_map", fuzz::repository::map);
