//! Who may connect, and over what: the mode of unix sockets, TCP without TLS, networks that are allowed.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net};

use crate::{Error, ErrorKind, ListenAddress};

/// Who may connect.
#[derive(Clone, Debug)]
pub struct Access {
    /// The permissions of unix sockets that are made; those of systemd's are systemd's.
    pub socket_mode: u32,
    /// Clients on TCP come from one of these networks, and there are no clients on vsock, which has no networks; empty
    /// allows everybody. Unix sockets are not affected: their permissions say who may connect.
    pub networks: Vec<Network>,
    /// TCP beyond this machine may go without TLS.
    pub insecure: bool,
    /// No client is served without TLS.
    pub tls_is_required: bool,
}

impl Default for Access {
    fn default() -> Self {
        Self { socket_mode: 0o600, networks: Vec::new(), insecure: false, tls_is_required: false }
    }
}

impl Access {
    /// Whether this peer may connect; `None` is a peer whose address family is not known, or has no networks.
    pub(crate) fn allows(&self, peer: Option<IpAddr>) -> bool {
        self.networks.is_empty()
            || peer.is_some_and(|peer| self.networks.iter().any(|network| network.contains(peer)))
    }

    /// Whether what goes over TCP there could be read and changed on the way.
    pub(crate) fn is_open(&self, at: SocketAddr) -> bool {
        !self.tls_is_required && !at.ip().to_canonical().is_loopback()
    }

    /// Refuses to listen where anybody could read along, unless that is wanted.
    pub(crate) fn check_tcp(&self, address: &ListenAddress, at: SocketAddr) -> Result<(), Error> {
        if self.insecure || !self.is_open(at) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Insecure,
            format!(
                "{address} can be reached from other machines, and without TLS whoever is on the way there could read \
                 and change the disks: require TLS, listen at 127.0.0.1, [::1] or a unix socket, or give --insecure"
            ),
        ))
    }

    /// Refuses a vsock address beside allowed networks: nobody could ever connect.
    pub(crate) fn check_vsock(&self, address: &ListenAddress) -> Result<(), Error> {
        if self.networks.is_empty() {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::InvalidAddress,
            format!("nobody could connect to {address}: vsock has no networks, and only some are allowed"),
        ))
    }
}

/// A network: `192.0.2.0/24`, `2001:db8::/32`, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network(IpNet);

impl Network {
    /// Whether an address is of this network. One of IPv4 that is written as IPv6 is one of IPv4.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }
}

impl FromStr for Network {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let parsed = match text.parse::<IpAddr>() {
            Ok(address) => Some(IpNet::from(address)),
            Err(_) => text.parse().ok(),
        };
        let network = parsed.ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidAddress,
                format!("\"{text}\" is no network (like 192.0.2.0/24, 2001:db8::/32, or one address)"),
            )
        })?;
        let mapped = match network {
            IpNet::V6(six) if six.prefix_len() >= 96 => six.addr().to_ipv4_mapped(),
            _ => None,
        };
        let four = mapped.and_then(|address| Ipv4Net::new(address, network.prefix_len() - 96).ok());
        Ok(Self(four.map_or(network, IpNet::V4)))
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(networks: &[&str]) -> Access {
        let networks = networks.iter().map(|text| text.parse().unwrap()).collect();
        Access { networks, ..Access::default() }
    }

    #[test]
    fn who_is_in_none_of_the_networks_is_denied_once_there_is_one() {
        let access = only(&["192.0.2.0/25", "2001:db8::/32", "10.1.2.3"]);
        let allows = |address: &str| access.allows(Some(address.parse().unwrap()));
        for inside in ["192.0.2.0", "192.0.2.127", "2001:db8:1::", "10.1.2.3"] {
            assert!(allows(inside), "{inside}");
        }
        // The second last is no prefix of text: 192.0.2.12 and 192.0.2.128 begin alike.
        for outside in ["192.0.2.128", "2001:db9::", "10.1.2.4", "192.0.21.2", "::1", "127.0.0.1"] {
            assert!(!allows(outside), "{outside}");
        }
        assert!(!access.allows(None), "an address family that is not known");
        assert!(Access::default().allows(None) && Access::default().allows(Some([9, 9, 9, 9].into())));
    }

    #[test]
    fn ipv4_in_ipv6_is_ipv4_on_both_sides() {
        let four = only(&["192.0.2.0/24"]);
        assert!(four.allows(Some("::ffff:192.0.2.9".parse().unwrap())));
        assert!(!four.allows(Some("::ffff:192.0.3.9".parse().unwrap())));
        let six = only(&["::ffff:192.0.2.0/120", "::ffff:10.0.0.1"]);
        assert!(six.allows(Some("192.0.2.9".parse().unwrap())));
        assert!(six.allows(Some("10.0.0.1".parse().unwrap())));
        assert!(!six.allows(Some("192.0.3.9".parse().unwrap())));
        // All of IPv6, and none of IPv4.
        assert!(!only(&["::/0"]).allows(Some("::ffff:192.0.2.9".parse().unwrap())));
    }

    #[test]
    fn what_is_no_network_is_said_so() {
        for text in ["", "192.0.2", "192.0.2.0/33", "host", "192.0.2.0/-1", "10.0.0.0/8/8"] {
            let error = text.parse::<Network>().unwrap_err();
            assert!(error.to_string().contains("is no network"), "{error}");
        }
    }
}
