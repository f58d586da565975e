//! The two halves of NBD.
//!
//! Every target gives its bytes to the parser twice, once as one piece and once torn into many, and wants the same of
//! both. What the one half sends is taken apart with the other half, or here.

mod client_handshake;
mod client_replies;
mod exports;
pub mod seeds;
mod server_handshake;
mod server_transmission;

pub use client_handshake::client_handshake;
pub use client_replies::client_replies;
pub use server_handshake::server_handshake;
pub use server_transmission::server_transmission;
