//! NBD on the wire: bytes in, messages out, for both ends of a connection.
//!
//! Nothing here does I/O, knows a clock or starts a thread: a caller feeds what it received and
//! sends what it finds in the output. So both halves can be tested against each other, and against
//! garbage, by the million.
//!
//! - [`wire`]: what both halves share: magic numbers, flags, limits, error numbers, and the bounded reader
//!   through which every byte of a peer goes;
//! - [`server`]: the handshake as a server sees it, admission of requests, encoding of replies;
//! - [`client`]: the handshake as a client sees it, encoding of requests, checking of replies.
//!
//! Not here yet, but laid out for: STARTTLS ([`wire::OptionKind::StartTls`], answered by policy).

pub mod client;
pub mod server;
pub mod wire;
