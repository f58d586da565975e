//! A server in transmission, given a client's bytes.
#![cfg_attr(fuzzing, no_main)]

fuzz::program!("wire_server_transmission", fuzz::wire::server_transmission);
