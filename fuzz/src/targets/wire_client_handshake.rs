//! A client's handshake, given a server's bytes.
#![cfg_attr(fuzzing, no_main)]

fuzz::program!("wire_client_handshake", fuzz::wire::client_handshake);
