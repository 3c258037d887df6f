//! Launches of small steps, recorded once and replayed: a step of one row is some three hundred launches, and asking for them one
//! by one takes longer than running them.

use std::collections::HashMap;

use super::driver::Driver;
use super::step_data::Needs;

/// Rows up to which steps are recorded, each for the next larger bucket.
const BUCKETS: [usize; 11] = [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, MAX_BUCKET];
pub(super) const MAX_BUCKET: usize = 64;

/// What the launches of a step depend on. All else is data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct GraphKey {
    pub bucket: usize,
    pub wants_logits: bool,
    pub needs: Needs,
}

#[derive(Debug)]
pub(super) struct Graphs<D: Driver>(HashMap<GraphKey, D::Graph>);

impl<D: Driver> Graphs<D> {
    pub fn new() -> Self {
        Self(HashMap::new())
    }

    /// The bucket of a step with so many rows; `None` when it is too large to be recorded.
    pub fn bucket(num_rows: usize) -> Option<usize> {
        BUCKETS.into_iter().find(|bucket| num_rows <= *bucket)
    }

    pub fn get(&self, key: &GraphKey) -> Option<&D::Graph> {
        self.0.get(key)
    }

    pub fn insert(&mut self, key: GraphKey, graph: D::Graph) -> &D::Graph {
        self.0.entry(key).or_insert(graph)
    }

    /// What was recorded is not valid any more: buffers have moved.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}
