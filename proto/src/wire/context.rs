//! Metadata contexts: their names, how a query selects them, and what their descriptors say.

use std::fmt;

const BASE_ALLOCATION: &str = "base:allocation";
const QEMU_DEPTH: &str = "qemu:allocation-depth";
const QEMU_BITMAP: &str = "qemu:dirty-bitmap:";

/// A metadata context.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum MetaContext {
    /// `base:allocation`: bit 0 a hole, bit 1 zeroes.
    Allocation,
    /// `qemu:allocation-depth`: how deep in a chain the bytes lie; 0 where nothing is allocated.
    Depth,
    /// `qemu:dirty-bitmap:NAME`: bit 0 written since the bitmap began.
    DirtyBitmap(String),
}

impl MetaContext {
    /// The context of exactly this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            BASE_ALLOCATION => Some(Self::Allocation),
            QEMU_DEPTH => Some(Self::Depth),
            _ => match name.strip_prefix(QEMU_BITMAP) {
                Some(bitmap) if !bitmap.is_empty() => Some(Self::DirtyBitmap(bitmap.to_owned())),
                _ => None,
            },
        }
    }
}

impl fmt::Display for MetaContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allocation => f.write_str(BASE_ALLOCATION),
            Self::Depth => f.write_str(QEMU_DEPTH),
            Self::DirtyBitmap(name) => write!(f, "{QEMU_BITMAP}{name}"),
        }
    }
}

/// A query of LIST_META_CONTEXT or SET_META_CONTEXT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContextQuery<'a>(pub &'a str);

impl ContextQuery<'_> {
    /// Whether it has the form of a query at all: a namespace and a colon.
    #[must_use]
    pub fn is_wellformed(self) -> bool {
        self.0.contains(':')
    }

    /// Whether SET selects `context` by it: by its exact name only, never by a wildcard.
    #[must_use]
    pub fn selects(self, context: &MetaContext) -> bool {
        MetaContext::from_name(self.0).as_ref() == Some(context)
    }

    /// Whether LIST tells of `context` for it: by its exact name, or by a wildcard: `base:`, `qemu:`, `qemu:dirty-bitmap:`.
    #[must_use]
    pub fn lists(self, context: &MetaContext) -> bool {
        match self.0 {
            "base:" => matches!(context, MetaContext::Allocation),
            "qemu:" => matches!(context, MetaContext::Depth | MetaContext::DirtyBitmap(_)),
            QEMU_BITMAP => matches!(context, MetaContext::DirtyBitmap(_)),
            _ => self.selects(context),
        }
    }
}

/// The number that stands for a selected context on one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContextId(pub u32);

/// A context that SET_META_CONTEXT selected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SelectedContext {
    /// Its number on this connection.
    pub id: ContextId,
    /// Which it is.
    pub context: MetaContext,
}

/// One extent of a BLOCK_STATUS reply. On the wire both numbers have 32 bits, with extended headers 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// How many bytes, never 0.
    pub len: u64,
    /// What the context says of them.
    pub flags: u64,
}

impl Descriptor {
    /// Its length on the wire, in bytes.
    pub const BYTES: usize = 8;
    /// The same with extended headers.
    pub const EXTENDED_BYTES: usize = 16;
    /// `base:allocation`: no room is allocated.
    pub const HOLE: u64 = 1;
    /// `base:allocation`: it reads as zeroes.
    pub const ZERO: u64 = 2;
    /// `qemu:dirty-bitmap:`: it was written.
    pub const DIRTY: u64 = 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_list_and_never_select() {
        let bitmap = MetaContext::DirtyBitmap("restore".to_owned());
        assert!(ContextQuery("qemu:").lists(&bitmap));
        assert!(ContextQuery("qemu:dirty-bitmap:").lists(&bitmap));
        assert!(ContextQuery("qemu:dirty-bitmap:restore").lists(&bitmap));
        assert!(!ContextQuery("qemu:dirty-bitmap:rest").lists(&bitmap));
        assert!(!ContextQuery("qemu:dirty-bitmap:").selects(&bitmap));
        assert!(!ContextQuery("base:").selects(&MetaContext::Allocation));
        assert!(ContextQuery("base:allocation").selects(&MetaContext::Allocation));
        assert!(!ContextQuery("base:").lists(&bitmap));
    }

    #[test]
    fn names_survive_the_way_there_and_back() {
        for name in ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b 0"] {
            assert_eq!(MetaContext::from_name(name).unwrap().to_string(), name);
        }
        assert_eq!(MetaContext::from_name("qemu:dirty-bitmap:"), None);
    }
}
