//! `lifeboot-nbd`: serves one raw file or block device over NBD, for comparison with nbdkit and qemu-nbd.

mod program;

use std::process::ExitCode;

use clap::Parser;

use program::Arguments;

fn main() -> ExitCode {
    // clap ends the process itself, with 2, where the arguments make no sense.
    let arguments = Arguments::parse();
    let level = match arguments.verbose {
        0 => tracing::Level::WARN,
        1 => tracing::Level::INFO,
        _ => tracing::Level::DEBUG,
    };
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).init();
    match program::serve(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The messages of the crates beneath say their causes themselves.
            eprintln!("lifeboot-nbd: {error}");
            ExitCode::FAILURE
        }
    }
}
