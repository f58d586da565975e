//! `lifeboot-nbd`: serves one raw file or block device over NBD, for comparison with nbdkit and qemu-nbd.

mod program;

use std::process::ExitCode;

use clap::Parser;

use nbd_server::log_queue::{self, LogQueue};
use program::Arguments;

fn main() -> ExitCode {
    // clap ends the process itself, with 2, where the arguments make no sense.
    let arguments = Arguments::parse();
    let level = match arguments.verbose {
        0 => tracing::Level::WARN,
        1 => tracing::Level::INFO,
        _ => tracing::Level::DEBUG,
    };
    // Nothing here writes to stderr but the queue: a reader that is gone, or does not read, is no reason to stop serving.
    let log = LogQueue::to_stderr();
    log.say_panics("lifeboot-nbd");
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(log.clone())
        .with_ansi(log_queue::has_colours())
        .log_internal_errors(false)
        .init();
    let code = match program::serve(&arguments, &log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The messages of the crates beneath say their causes themselves.
            log.put(format!("lifeboot-nbd: {error}\n").as_bytes());
            ExitCode::FAILURE
        }
    };
    log.flush(log_queue::PATIENCE_AT_END);
    code
}
