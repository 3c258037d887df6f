//! An adapter as it lies in device memory: one run of bytes, its table first.
//!
//! It is laid out without knowing where it will lie: what its table points to is counted from its own beginning, and 0, the
//! table's own place, is no address. `relocate` makes addresses of that.

use crate::canonical::{AdapterWeights, EmbeddingDelta, HeadDelta, LAYERS_PER_BLOCK, Prelude, SiteDelta};
use crate::low_rank::LowRank;

use super::args::{AdapterTable, Site};
use super::driver::{KernelArgs, bytes_of};
use super::low_rank::{PairRows, row_major, row_stride};

/// Every part begins at a multiple of this.
const ALIGNMENT: usize = 16;

/// The bytes of an adapter, addresses counted from its beginning.
#[derive(Debug, Default)]
pub(super) struct AdapterBytes {
    table: AdapterTable,
    sites: Vec<Site>,
    /// All of it, with room for the table in front.
    bytes: Vec<u8>,
}

/// Bytes that an adapter of `num_layers` decoder blocks takes on the device, at most: as if each part ended between two
/// multiples of [`ALIGNMENT`].
pub(super) fn device_bytes(weights: &AdapterWeights, num_layers: usize) -> usize {
    let sites: usize = weights.sites().chain(weights.head_delta()).map(site_bytes).sum();
    let embedding = weights.embedding.as_ref().map_or(0, |EmbeddingDelta { a, b, .. }| a.len() * 2 + b.len() * 4);
    let prelude = match &weights.prelude {
        None => 0,
        Some(Prelude::Embeddings { rows, .. }) => rows.len() * 4,
        Some(Prelude::KeyValues { keys, values, .. }) => keys.iter().chain(values).map(|rows| rows.len() * 2).sum(),
    };
    let replaced = match &weights.head {
        Some(HeadDelta::Replaced(head)) => head.num_rows() * row_stride(head.num_columns()) * 2,
        _ => 0,
    };
    table_bytes(num_layers) + sites + embedding + prelude + replaced + 6 * ALIGNMENT
}

fn site_bytes(site: &SiteDelta) -> usize {
    let low_rank = site.low_rank.as_ref().map_or(0, |pair| {
        let (a_stride, b_stride) = strides(pair);
        pair.rank() * (a_stride * 2 + 4) + pair.out_features() * b_stride * 2
    });
    let vectors = [&site.input_scale, &site.output_scale, &site.bias].into_iter().flatten();
    low_rank + vectors.map(|vector| vector.len() * 4).sum::<usize>() + 6 * ALIGNMENT
}

/// Of the rows of A and of B.
fn strides(pair: &LowRank) -> (usize, usize) {
    (row_stride(pair.in_features()), row_stride(pair.rank()))
}

fn table_bytes(num_layers: usize) -> usize {
    size_of::<AdapterTable>() + num_sites(num_layers) * size_of::<Site>()
}

/// The linear layers of all blocks, and the head.
fn num_sites(num_layers: usize) -> usize {
    num_layers * LAYERS_PER_BLOCK + 1
}

impl AdapterBytes {
    /// Takes time in proportion to the adapter: not for the engine's thread.
    pub fn of(weights: &AdapterWeights, num_layers: usize) -> Self {
        let mut this = Self { bytes: vec![0; table_bytes(num_layers)], ..Self::default() };
        for layer in 0..num_layers {
            for module in 0..LAYERS_PER_BLOCK {
                let site = weights.site(layer, module).map(|site| this.site(site));
                this.sites.push(site.unwrap_or_default());
            }
        }
        let head = weights.head_delta().map(|site| this.site(site));
        this.sites.push(head.unwrap_or_default());
        if let Some(HeadDelta::Replaced(head)) = &weights.head {
            let mut rows = Vec::new();
            row_major(head, row_stride(head.num_columns()), &mut rows);
            this.table.head = this.halves(&rows);
        }
        if let Some(embedding) = &weights.embedding {
            this.table.embedding_rank = embedding.rank as i32;
            this.table.embedding_a = this.put(embedding.a.iter().flat_map(|half| half.to_le_bytes()));
            this.table.embedding_b = this.floats(&embedding.b);
        }
        match &weights.prelude {
            None => {}
            Some(Prelude::Embeddings { num_tokens, rows }) => {
                this.table.num_virtual = *num_tokens as i32;
                this.table.prelude_rows = this.floats(rows);
            }
            Some(Prelude::KeyValues { num_tokens, keys, values }) => {
                this.table.num_virtual = *num_tokens as i32;
                this.table.prelude_keys = this.rounded(keys);
                this.table.prelude_values = this.rounded(values);
            }
        }
        this
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The bytes as they lie at `address`.
    pub fn relocate(self, address: u64) -> Vec<u8> {
        let Self { mut table, sites, mut bytes } = self;
        let at = |place: &mut u64| *place += if *place == 0 { 0 } else { address };
        let AdapterTable { embedding_a, embedding_b, prelude_rows, prelude_keys, prelude_values, head, .. } =
            &mut table;
        [embedding_a, embedding_b, prelude_rows, prelude_keys, prelude_values, head].into_iter().for_each(at);
        let (head, rest) = bytes.split_at_mut(size_of::<AdapterTable>());
        head.copy_from_slice(bytes_of(&table));
        for (mut site, place) in sites.into_iter().zip(rest.chunks_exact_mut(size_of::<Site>())) {
            let Site { a, b, scales, input_scale, output_scale, bias, .. } = &mut site;
            [a, b, scales, input_scale, output_scale, bias].into_iter().for_each(at);
            place.copy_from_slice(bytes_of(&site));
        }
        bytes
    }

    fn site(&mut self, delta: &SiteDelta) -> Site {
        let SiteDelta { input_scale, low_rank, output_scale, bias } = delta;
        let mut site = low_rank.as_ref().map(|pair| self.low_rank(pair)).unwrap_or_default();
        let mut vector = |vector: &Option<Vec<f32>>| vector.as_ref().map_or(0, |values| self.floats(values));
        site.input_scale = vector(input_scale);
        site.output_scale = vector(output_scale);
        site.bias = vector(bias);
        site
    }

    fn low_rank(&mut self, pair: &LowRank) -> Site {
        let PairRows { rank, a, a_stride, b, b_stride, scales } = PairRows::new(pair);
        Site {
            a: self.halves(&a),
            b: self.halves(&b),
            scales: self.floats(&scales),
            rank: rank as i32,
            a_stride: a_stride as i32,
            b_stride: b_stride as i32,
            ..Site::default()
        }
    }

    /// Of their bits.
    fn halves(&mut self, halves: &[u16]) -> u64 {
        self.put(halves.iter().flat_map(|half| half.to_le_bytes()))
    }

    fn floats(&mut self, values: &[f32]) -> u64 {
        self.put(values.iter().flat_map(|value| value.to_le_bytes()))
    }

    /// Rounded to f16.
    fn rounded(&mut self, layers: &[Vec<f32>]) -> u64 {
        self.put(layers.iter().flatten().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()))
    }

    /// Where the bytes stand.
    fn put(&mut self, bytes: impl Iterator<Item = u8>) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let place = self.bytes.len() as u64;
        self.bytes.extend(bytes);
        place
    }
}

// SAFETY: no padding (their sizes are those of their fields, see `args.rs`).
unsafe impl KernelArgs for AdapterTable {}
// SAFETY: as above.
unsafe impl KernelArgs for Site {}
