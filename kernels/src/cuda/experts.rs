//! Feed-forwards of experts: `kernels/cuda/experts.cuh`, and what lies between router and sum.

use crate::device::DeviceError;
use crate::shape::{DecoderShape, Experts};

use super::activations::activation_stride;
use super::args::{Activations, BlockMeta, RowGroup};
use super::driver::{DeviceMemory, Driver, DriverError, KernelArgs, bytes_of};
use super::gemm::GemmKernel;
use super::linear::{ByExpert, Input};

pub const MAX_EXPERTS: usize = 512;
pub const MAX_USED: usize = 32;

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ChooseArgs {
    /// f32 `[rows, num_experts]`
    pub scores: u64,
    /// i32 `[rows, used]`, written: the experts of a row, the best first.
    pub chosen: u64,
    /// f32, written: the share that each has of the sum.
    pub shares: u64,
    pub num_rows: i32,
    pub num_experts: i32,
    pub used: i32,
    /// Whether the shares of a row add up to 1.
    pub normalizes_shares: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct DealArgs {
    /// i32 `[num_slots]`, as [`ChooseArgs::chosen`].
    pub chosen: u64,
    /// Tables of the rows' adapters, or 0.
    pub adapters: u64,
    /// i32 `[num_slots]`, written: the slot of each choice.
    pub places: u64,
    /// i32 `[num_slots]`, written: the row of each slot.
    pub rows: u64,
    /// i32, written: its expert.
    pub experts: u64,
    /// u64, written if there are adapters: the table of its adapter, moved so that the sites of the first expert are its expert's.
    pub slot_adapters: u64,
    /// [`RowGroup`] `[num_groups]`, written.
    pub groups: u64,
    pub num_slots: i32,
    pub used: i32,
    pub num_experts: i32,
    pub group_rows: i32,
    pub num_groups: i32,
    pub unused: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct GatherArgs {
    exact: u64,
    slot_exact: u64,
    rows: u64,
    activations: Activations,
    slot_activations: Activations,
    width: i32,
    unused: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct SumSlotsArgs {
    slots: u64,
    places: u64,
    shares: u64,
    sums: u64,
    width: i32,
    used: i32,
}

const _: () = {
    assert!(size_of::<ChooseArgs>() == 40);
    assert!(size_of::<DealArgs>() == 80);
    assert!(size_of::<GatherArgs>() == 80);
    assert!(size_of::<SumSlotsArgs>() == 40);
};

// SAFETY: no padding; whoever fills it in vouches for the addresses.
unsafe impl KernelArgs for ChooseArgs {}
// SAFETY: as above.
unsafe impl KernelArgs for DealArgs {}
// SAFETY: as above.
unsafe impl KernelArgs for GatherArgs {}
// SAFETY: as above.
unsafe impl KernelArgs for SumSlotsArgs {}

/// Chooses each row's experts.
///
/// # Errors
/// When the driver fails.
pub fn choose_experts<D: Driver>(driver: &D, args: &ChooseArgs) -> Result<(), DriverError> {
    // SAFETY: `KernelArgs`; written are choices and shares.
    unsafe { driver.launch("choose_experts", [(args.num_rows as u32).div_ceil(8), 1, 1], bytes_of(args)) }
}

/// Gives each choice its slot, and cuts the slots into groups.
///
/// # Errors
/// When the driver fails.
///
/// # Panics
/// When there may be more groups than there is room for.
pub fn deal_slots<D: Driver>(driver: &D, args: &DealArgs) -> Result<(), DriverError> {
    let [slots, experts, group_rows] = [args.num_slots, args.num_experts, args.group_rows].map(|n| n as usize);
    assert!(max_groups(slots, experts, group_rows) <= args.num_groups as usize, "groups of slots");
    // SAFETY: `KernelArgs`; written are the arrays of slots, and the groups, of which there are no more (see above).
    unsafe { driver.launch("deal_slots", [1, 1, 1], bytes_of(args)) }
}

/// The most groups of `group_rows` that slots of so many experts may be: all experts have some if there are as many, each with a
/// last group that is not full.
pub fn max_groups(num_slots: usize, num_experts: usize, group_rows: usize) -> usize {
    let active = num_experts.min(num_slots);
    active + (num_slots - active) / group_rows
}

/// What is kept between the launches of a feed-forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Array {
    /// f32 `[rows, experts]`
    Scores,
    /// i32 `[slots]`
    Chosen,
    Shares,
    Places,
    Rows,
    Experts,
    /// u64 `[slots]`
    Adapters,
    Groups,
    /// f32 `[slots, hidden]`: what the rows read; the same as int8.
    Exact,
    Values,
    Meta,
    /// f32 `[slots, hidden]`
    Down,
}

const ALL: [Array; 12] = [
    Array::Scores,
    Array::Chosen,
    Array::Shares,
    Array::Places,
    Array::Rows,
    Array::Experts,
    Array::Adapters,
    Array::Groups,
    Array::Exact,
    Array::Values,
    Array::Meta,
    Array::Down,
];

impl Array {
    fn bytes(self, shape: &DecoderShape, experts: Experts, rows: usize) -> usize {
        let (slots, stride) = (shape.num_slots(rows), activation_stride(shape.hidden_size));
        match self {
            Self::Scores => rows * experts.count * 4,
            Self::Chosen | Self::Shares | Self::Places | Self::Rows | Self::Experts => slots * 4,
            Self::Adapters => slots * 8,
            Self::Groups => max_groups(slots, experts.count, GemmKernel::Decode1.group_rows()) * size_of::<RowGroup>(),
            Self::Exact | Self::Down => slots * shape.hidden_size * 4,
            Self::Values => slots * stride,
            Self::Meta => slots * stride / 32 * size_of::<BlockMeta>(),
        }
    }
}

/// Slots of a decoder whose feed-forwards are of experts.
#[derive(Debug)]
pub(super) struct Slots<D: Driver> {
    experts: Experts,
    hidden_size: usize,
    /// `[Array as usize]`
    memory: Vec<D::Memory>,
}

impl<D: Driver> Slots<D> {
    /// For steps of up to `rows` rows; none where there are no experts.
    pub fn new(driver: &D, shape: &DecoderShape, rows: usize) -> Result<Option<Self>, DriverError> {
        let new = |experts: Experts| {
            let memory = ALL.into_iter().map(|array| driver.allocate(array.bytes(shape, experts, rows)));
            Ok(Self { experts, hidden_size: shape.hidden_size, memory: memory.collect::<Result<_, _>>()? })
        };
        shape.experts.map(new).transpose()
    }

    /// Bytes that such slots take.
    pub fn bytes(shape: &DecoderShape, rows: usize) -> usize {
        let of = |experts| ALL.into_iter().map(|array| array.bytes(shape, experts, rows).next_multiple_of(512)).sum();
        shape.experts.map_or(0, of)
    }

    fn address(&self, array: Array) -> u64 {
        self.memory[array as usize].address()
    }

    /// Where the router is to write.
    pub fn scores(&self) -> u64 {
        self.address(Array::Scores)
    }

    /// Where the experts' last layers are to write.
    pub fn down(&self) -> u64 {
        self.address(Array::Down)
    }

    /// Deals the rows of `input` by the scores that the router wrote; what the first layers of their experts read.
    pub fn deal(&self, driver: &D, input: &Input) -> Result<Input, DeviceError> {
        let Experts { count, used, normalizes_shares } = self.experts;
        let num_rows = input.activations.num_rows as usize;
        let num_slots = num_rows * used;
        let choose = ChooseArgs {
            scores: self.scores(),
            chosen: self.address(Array::Chosen),
            shares: self.address(Array::Shares),
            num_rows: num_rows as i32,
            num_experts: count as i32,
            used: used as i32,
            normalizes_shares: i32::from(normalizes_shares),
        };
        choose_experts(driver, &choose)?;
        // Where the rows are dealt evenly, as many as this kernel takes.
        let kernel = GemmKernel::for_rows(num_slots.div_ceil(count));
        let num_groups = max_groups(num_slots, count, kernel.group_rows());
        let deal = DealArgs {
            chosen: choose.chosen,
            adapters: input.adapters,
            places: self.address(Array::Places),
            rows: self.address(Array::Rows),
            experts: self.address(Array::Experts),
            slot_adapters: self.address(Array::Adapters),
            groups: self.address(Array::Groups),
            num_slots: num_slots as i32,
            used: used as i32,
            num_experts: count as i32,
            group_rows: kernel.group_rows() as i32,
            num_groups: num_groups as i32,
            unused: 0,
        };
        deal_slots(driver, &deal)?;
        let activations = Activations {
            values: self.address(Array::Values),
            meta: self.address(Array::Meta),
            num_rows: num_slots as i32,
            ..input.activations
        };
        let gather = GatherArgs {
            exact: input.exact,
            slot_exact: self.address(Array::Exact),
            rows: deal.rows,
            activations: input.activations,
            slot_activations: activations,
            width: self.hidden_size as i32,
            unused: 0,
        };
        // SAFETY: `KernelArgs`; written are the slots' activations.
        unsafe { driver.launch("gather_slots", [num_slots as u32, 1, 1], bytes_of(&gather))? };
        let by_expert = ByExpert { experts: deal.experts, groups: deal.groups, num_groups, kernel };
        Ok(Input {
            exact: gather.slot_exact,
            activations,
            width: self.hidden_size,
            adapters: if input.adapters == 0 { 0 } else { deal.slot_adapters },
            by_expert: Some(by_expert),
        })
    }

    /// Adds up what the experts' last layers wrote, for `num_rows` rows.
    pub fn sum(&self, driver: &D, num_rows: usize, sums: u64) -> Result<(), DeviceError> {
        let args = SumSlotsArgs {
            slots: self.down(),
            places: self.address(Array::Places),
            shares: self.address(Array::Shares),
            sums,
            width: self.hidden_size as i32,
            used: self.experts.used as i32,
        };
        let grid = [num_rows as u32, (self.hidden_size as u32).div_ceil(256), 1];
        // SAFETY: `KernelArgs`; the sums alone are written.
        unsafe { driver.launch("sum_slots", grid, bytes_of(&args))? };
        Ok(())
    }
}
