//! The options of every program that listens: where, for whom, and what its clients may cost.

use std::time::Duration;

use crate::{
    Access, LateRequests, Limits, ListenAddress, Network, ServerOptions, TlsArgs, TlsServer, is_activated,
};

/// Where to listen, for whom, and what clients may cost.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Connections")]
pub struct ListenArgs {
    /// Where to listen: unix:PATH, tcp:HOST:PORT, vsock:CID:PORT (CID `any` is this machine's), or systemd for the
    /// sockets of a .socket unit, which are also served where no address is given; may be given several times
    #[arg(short, long, value_name = "ADDRESS")]
    pub listen: Vec<ListenAddress>,

    /// Permissions of unix sockets, in octal
    #[arg(long, value_name = "MODE", default_value = "600", value_parser = parse_mode)]
    pub socket_mode: u32,

    /// Listen on TCP beyond this machine though TLS is not required: whoever is on the way can read and change the disks
    #[arg(long)]
    pub insecure: bool,

    /// Serve clients on TCP from these networks alone, like 192.0.2.0/24 or 2001:db8::1; may be given several times. Unix
    /// sockets are not affected
    #[arg(long, value_name = "NETWORK")]
    pub allow: Vec<Network>,

    /// Connections at once; one more is closed
    #[arg(long, value_name = "N", default_value_t = Limits::default().connections as u32,
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub max_connections: u32,

    /// Those of them in their handshake; one more takes the place of the oldest that has had a second
    #[arg(long, value_name = "N", default_value_t = Limits::default().half_open as u32,
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub max_half_open: u32,

    /// How long a handshake may take, TLS included
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_bound)]
    pub handshake_timeout: Duration,

    /// How long a client may take none of its replies, or send nothing of what it announced. Where another client
    /// waits for that memory it is 30 s. A QEMU whose process is stopped for longer needs reconnect-delay
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_bound)]
    pub stall_timeout: Duration,

    /// Whether and with what clients are served over TLS.
    // Last: its heading is over all that follows.
    #[command(flatten)]
    pub tls: TlsArgs,
}

impl ListenArgs {
    /// The addresses: those that were given, or systemd's sockets where none was.
    ///
    /// # Errors
    /// Where there is none, or systemd's sockets would be left alone: what is wrong with the command line.
    pub fn addresses(&self) -> Result<Vec<ListenAddress>, String> {
        let names_systemd = self.listen.contains(&ListenAddress::Systemd);
        match (self.listen.is_empty(), is_activated()) {
            (true, true) => Ok(vec![ListenAddress::Systemd]),
            (true, false) => Err("no address to listen at: give --listen ADDRESS".to_owned()),
            (false, true) if !names_systemd => {
                Err("systemd has given sockets, and nobody would answer there: add \
                 --listen systemd, or start this without its .socket unit"
                    .to_owned())
            }
            (false, _) => Ok(self.listen.clone()),
        }
    }

    /// Whether all sockets are systemd's.
    #[must_use]
    pub fn is_given(&self) -> bool {
        self.listen.iter().all(|address| *address == ListenAddress::Systemd)
    }

    /// What a server is told of all this. The files of TLS are read.
    ///
    /// # Errors
    /// As [`TlsArgs::load`].
    pub fn options(&self, late_requests: LateRequests) -> crate::Result<ServerOptions> {
        let tls = self.tls.load()?;
        let limits = Limits {
            handshake_timeout: self.handshake_timeout,
            connections: self.max_connections as usize,
            half_open: self.max_half_open as usize,
            stall_timeout: self.stall_timeout,
            ..Limits::default()
        };
        let access = Access {
            socket_mode: self.socket_mode,
            networks: self.allow.clone(),
            insecure: self.insecure,
            tls_is_required: tls.as_ref().is_some_and(TlsServer::is_required),
        };
        Ok(ServerOptions { limits, access, late_requests, tls })
    }
}

fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 && mode & 0o600 == 0o600 => Ok(mode),
        _ => Err(format!(
            "{text:?} is no mode of a socket: three octal digits, the first 6 or 7, like 600 or 660"
        )),
    }
}

/// Reads a time with its unit: `5ms`, `30s`, `2m`; and `0`.
///
/// # Errors
/// A sentence for the user where it is none, or is negative.
pub fn parse_time(text: &str) -> Result<Duration, String> {
    if text.trim() == "0" {
        return Ok(Duration::ZERO);
    }
    let time: Option<jiff::SignedDuration> = text.parse().ok();
    time.and_then(|time| Duration::try_from(time).ok()).ok_or_else(|| no_time(text))
}

/// The same of what bounds something: not zero, and no longer than timers reach.
fn parse_bound(text: &str) -> Result<Duration, String> {
    let most = Duration::from_secs(365 * 24 * 3600);
    Some(parse_time(text)?).filter(|time| !time.is_zero() && *time <= most).ok_or_else(|| no_time(text))
}

fn no_time(text: &str) -> String {
    format!("{text:?} is no time: write a number with a unit, like 5ms, 30s or 2m")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        listen: ListenArgs,
    }

    fn parse(arguments: &[&str]) -> Result<ListenArgs, clap::Error> {
        let arguments = std::iter::once(&"program").chain(arguments);
        Program::try_parse_from(arguments).map(|program| program.listen)
    }

    #[test]
    fn times_are_read_with_their_units() {
        for (text, time) in [
            ("5ms", Duration::from_millis(5)),
            ("0s", Duration::ZERO),
            ("0", Duration::ZERO),
            ("30s", Duration::from_secs(30)),
            ("2m", Duration::from_secs(120)),
            ("1h 30m", Duration::from_secs(5400)),
        ] {
            assert_eq!(parse_time(text), Ok(time), "{text}");
        }
        for text in ["", "5", "-5ms", "soon"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }

    #[test]
    fn without_options_the_limits_are_the_librarys() {
        let options = parse(&["-l", "unix:/s"]).unwrap().options(LateRequests::Refuse).unwrap();
        let (ours, theirs) = (format!("{options:?}"), format!("{:?}", ServerOptions::default()));
        assert_eq!(ours, theirs);
    }

    #[test]
    fn what_is_given_reaches_the_server() {
        let options = parse(&[
            "--listen=unix:/s",
            "--socket-mode=660",
            "--insecure",
            "--allow=192.0.2.0/24",
            "--allow=::1",
            "--max-connections=7",
            "--max-half-open=3",
            "--handshake-timeout=2s",
            "--stall-timeout=1m",
        ]);
        let ServerOptions { limits, access, .. } = options.unwrap().options(LateRequests::Leave).unwrap();
        assert_eq!((access.socket_mode, access.insecure, access.networks.len()), (0o660, true, 2));
        assert_eq!((limits.connections, limits.half_open), (7, 3));
        assert_eq!((limits.handshake_timeout.as_secs(), limits.stall_timeout.as_secs()), (2, 60));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for argument in [
            "--socket-mode=60",
            "--socket-mode=066",
            "--socket-mode=1600",
            "--socket-mode=rw",
            "--allow=everybody",
            "--max-connections=0",
            "--handshake-timeout=0s",
            "--stall-timeout=5",
            "--listen=tcp",
        ] {
            assert!(parse(&[argument]).is_err(), "{argument}");
        }
        assert!(parse(&[]).unwrap().addresses().unwrap_err().contains("--listen"));
    }
}
