//! The `lifeboot` program as people and scripts meet it: arguments in; output, exit codes and files out.
//! What it restores is compared with what was captured by the bytes, not by its own word.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking, its helpers too")]
mod advice;
mod captures;
mod control;
mod damage;
mod devices;
mod discards;
mod interrupts;
mod machines;
mod metrics;
mod moves;
mod refusals;
mod reports;
mod restores;
mod sessions;
mod several;
mod stranded;
mod support;
mod take_over;
mod unread;
mod watch;
mod words;
