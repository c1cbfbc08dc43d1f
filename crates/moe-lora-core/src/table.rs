//! Which token uses which adapter, and where a layer finds it.

use crate::{AdapterLayer, Lora, Projection};

/// A registered adapter: a pool slot and the slot's generation, so that the id of an adapter that was unloaded never
/// means the slot's next tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterId {
    /// Index into the pool.
    pub slot: u32,
    /// How many tenants the slot had before.
    pub generation: u32,
}

/// The adapter of every token of a batch, or none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TokenAdapters {
    ids: Vec<Option<AdapterId>>,
    slots: Vec<i32>,
}

impl TokenAdapters {
    /// One entry a token; `None` is the base model.
    #[must_use]
    pub fn from_ids(ids: &[Option<AdapterId>]) -> Self {
        // A pool never hands out a slot beyond i32, so a forged one becomes a slot that no table holds.
        let slot = |id: &AdapterId| i32::try_from(id.slot).unwrap_or(i32::MAX);
        Self { slots: ids.iter().map(|id| id.as_ref().map_or(-1, slot)).collect(), ids: ids.to_vec() }
    }

    /// A batch of `tokens` tokens that all use the base model.
    #[must_use]
    pub fn base(tokens: usize) -> Self {
        Self { ids: vec![None; tokens], slots: vec![-1; tokens] }
    }

    /// One entry a token.
    #[must_use]
    pub fn ids(&self) -> &[Option<AdapterId>] {
        &self.ids
    }

    /// The slot of every token, -1 for the base model, `[T]`.
    #[must_use]
    pub fn slots(&self) -> &[i32] {
        &self.slots
    }
}

/// Where one layer finds the adapters of a batch: by slot, expert and projection.
#[derive(Debug, Clone, Default)]
pub struct AdapterTable<'a> {
    slots: Vec<Option<&'a AdapterLayer>>,
}

impl<'a> AdapterTable<'a> {
    /// One entry a slot; `None` where the slot is empty or its adapter does not change this layer.
    #[must_use]
    pub fn new(slots: Vec<Option<&'a AdapterLayer>>) -> Self {
        Self { slots }
    }

    /// The adapter in a slot; `None` also for -1 and for slots that do not exist.
    #[must_use]
    pub fn layer(&self, slot: i32) -> Option<&'a AdapterLayer> {
        *self.slots.get(usize::try_from(slot).ok()?)?
    }

    /// One projection of one expert.
    #[must_use]
    pub fn get(&self, slot: i32, expert: usize, projection: Projection) -> Option<&'a Lora> {
        self.layer(slot)?.experts().get(expert)?.get(projection)
    }

    /// How many slots there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there is no slot.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The largest rank in any slot.
    #[must_use]
    pub fn max_rank(&self) -> usize {
        self.slots.iter().flatten().map(|l| l.max_rank()).max().unwrap_or(0)
    }
}
