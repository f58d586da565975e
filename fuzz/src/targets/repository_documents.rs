//! A configuration or a manifest.
#![cfg_attr(fuzzing, no_main)]

fuzz::program!("repository_documents", fuzz::repository::documents);
