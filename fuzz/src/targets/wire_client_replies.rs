//! A client in transmission, given a server's bytes.
#![cfg_attr(fuzzing, no_main)]

fuzz::program!("wire_client_replies", fuzz::wire::client_replies);
