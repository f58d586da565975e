//! Placeholder of this branch.
fn main() {}
