//! An adapter as it lies in device memory: one run of bytes, its table first.
//!
//! It is laid out without knowing where it will lie: what its table points to is counted from its own beginning, and 0, the
//! table's own place, is no address. `relocate` makes addresses of that.

use half::f16;

use crate::canonical::{AdapterWeights, HeadDelta, Prelude, SiteDelta};
use crate::half_matrix::HalfMatrix;
use crate::low_rank::LowRank;

use super::args::{AdapterTable, Site};
use super::driver::{KernelArgs, bytes_of};
use super::low_rank::{row_major, row_stride};

/// Every part begins at a multiple of this.
const ALIGNMENT: usize = 16;

/// Where everything of an adapter will lie, addresses counted from its beginning.
#[derive(Debug, Default)]
pub(super) struct AdapterLayout<'a> {
    table: AdapterTable,
    /// The linear layers of all blocks, and the head.
    sites: Vec<Site>,
    /// What comes behind table and sites, each where the one before it ends, rounded up.
    parts: Vec<Part<'a>>,
    len: usize,
}

/// Numbers of an adapter, and how the kernels read them.
#[derive(Debug)]
enum Part<'a> {
    Floats(&'a [f32]),
    Halves(&'a [f16]),
    /// f16, so many columns from row to row.
    Rows(&'a HalfMatrix, usize),
    /// Rounded to f16.
    Rounded(&'a [Vec<f32>]),
}

impl Part<'_> {
    /// Bytes.
    fn len(&self) -> usize {
        match self {
            Self::Floats(values) => values.len() * 4,
            Self::Halves(values) => values.len() * 2,
            Self::Rows(matrix, stride) => matrix.num_rows() * stride * 2,
            Self::Rounded(layers) => layers.iter().map(|values| values.len() * 2).sum(),
        }
    }

    fn append_to(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Floats(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
            Self::Halves(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
            Self::Rows(matrix, stride) => {
                let mut rows = Vec::new();
                row_major(matrix, *stride, &mut rows);
                bytes.extend(rows.iter().flat_map(|bits| bits.to_le_bytes()));
            }
            Self::Rounded(layers) => {
                bytes.extend(layers.iter().flatten().flat_map(|value| f16::from_f32(*value).to_le_bytes()));
            }
        }
    }
}

impl<'a> AdapterLayout<'a> {
    /// For a decoder of `num_layers` blocks of so many linear layers. Takes no time to speak of.
    pub fn of(weights: &'a AdapterWeights, (num_layers, layers_per_block): (usize, usize)) -> Self {
        let num_sites = num_layers * layers_per_block + 1;
        let len = size_of::<AdapterTable>() + num_sites * size_of::<Site>();
        let mut this = Self { len, ..Self::default() };
        for layer in 0..num_layers {
            for module in 0..layers_per_block {
                let site = weights.site(layer, module).map(|site| this.site(site));
                this.sites.push(site.unwrap_or_default());
            }
        }
        let head = weights.head_delta().map(|site| this.site(site));
        this.sites.push(head.unwrap_or_default());
        if let Some(HeadDelta::Replaced(head)) = &weights.head {
            this.table.head = this.put(Part::Rows(head, row_stride(head.num_columns())));
        }
        if let Some(embedding) = &weights.embedding {
            this.table.embedding_rank = embedding.rank as i32;
            this.table.embedding_a = this.put(Part::Halves(&embedding.a));
            this.table.embedding_b = this.put(Part::Floats(&embedding.b));
        }
        match &weights.prelude {
            None => {}
            Some(Prelude::Embeddings { num_tokens, rows }) => {
                this.table.num_virtual = *num_tokens as i32;
                this.table.prelude_rows = this.put(Part::Floats(rows));
            }
            Some(Prelude::KeyValues { num_tokens, keys, values }) => {
                this.table.num_virtual = *num_tokens as i32;
                this.table.prelude_keys = this.put(Part::Rounded(keys));
                this.table.prelude_values = this.put(Part::Rounded(values));
            }
        }
        this
    }

    /// Bytes that the adapter takes on the device.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Takes time in proportion to the adapter: not for the engine's thread.
    pub fn into_bytes(self) -> AdapterBytes {
        let Self { table, sites, parts, len } = self;
        let mut bytes = Vec::with_capacity(len);
        bytes.resize(size_of::<AdapterTable>() + sites.len() * size_of::<Site>(), 0);
        for part in parts {
            bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
            part.append_to(&mut bytes);
        }
        assert_eq!(bytes.len(), len, "the parts of an adapter are as long as they were said to be");
        AdapterBytes { table, sites, bytes }
    }

    fn site(&mut self, delta: &'a SiteDelta) -> Site {
        let SiteDelta { input_scale, low_rank, output_scale, bias } = delta;
        let mut site = low_rank.as_ref().map(|pair| self.low_rank(pair)).unwrap_or_default();
        let mut vector =
            |vector: &'a Option<Vec<f32>>| vector.as_ref().map_or(0, |values| self.put(Part::Floats(values)));
        site.input_scale = vector(input_scale);
        site.output_scale = vector(output_scale);
        site.bias = vector(bias);
        site
    }

    fn low_rank(&mut self, pair: &'a LowRank) -> Site {
        let (rank, a_stride, b_stride) = (pair.rank(), row_stride(pair.in_features()), row_stride(pair.rank()));
        Site {
            a: self.put(Part::Rows(pair.a(), a_stride)),
            b: self.put(Part::Rows(pair.b(), b_stride)),
            scales: self.put(Part::Floats(&pair.scales()[..rank])),
            rank: rank as i32,
            a_stride: a_stride as i32,
            b_stride: b_stride as i32,
            ..Site::default()
        }
    }

    /// Where the part will stand.
    fn put(&mut self, part: Part<'a>) -> u64 {
        let place = self.len.next_multiple_of(ALIGNMENT);
        self.len = place + part.len();
        self.parts.push(part);
        place as u64
    }
}

/// The bytes of an adapter, addresses counted from its beginning.
#[derive(Debug)]
pub(super) struct AdapterBytes {
    table: AdapterTable,
    sites: Vec<Site>,
    /// All of it, with room for the table in front.
    bytes: Vec<u8>,
}

impl AdapterBytes {
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
}

// SAFETY: no padding (their sizes are those of their fields, see `args.rs`).
unsafe impl KernelArgs for AdapterTable {}
// SAFETY: as above.
unsafe impl KernelArgs for Site {}
