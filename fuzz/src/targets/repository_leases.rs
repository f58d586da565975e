//! A lease.
#![cfg_attr(fuzzing, no_main)]

fuzz::program!("repository_leases", fuzz::repository::leases);
