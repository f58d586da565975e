//! A server's handshake, given a client's bytes.
#![cfg_attr(fuzzing, no_main)]

fuzz::program!("wire_server_handshake", fuzz::wire::server_handshake);
