//! The stored bytes of a chunk.
#![cfg_attr(fuzzing, no_main)]

fuzz::program!("repository_chunk", fuzz::repository::chunk);
