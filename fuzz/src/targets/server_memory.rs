//! Clients of a server most of whose memory others hold.
#![cfg_attr(fuzzing, no_main)]

fuzz::program!("server_memory", fuzz::server::memory);
