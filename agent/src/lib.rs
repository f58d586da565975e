//! Captures disks into a repository, restores them, and boots machines from their backup.

pub mod live;
pub mod source;
