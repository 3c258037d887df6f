//! What a step gives the host of its logits.

use crate::device::{Caller, DeviceError, Logits, Summary};

use super::buffers::Buffer;
use super::driver::Driver;
use super::head::RowSummary;
use super::{Cuda, StepMemory};

/// The logits of a row in device memory. They are copied when all are asked for.
struct DeviceLogits<'a, D: Driver> {
    driver: &'a D,
    memory: &'a D::Memory,
    row: usize,
    vocab_size: usize,
    summary: &'a RowSummary,
    /// The copy.
    host: &'a mut Vec<f32>,
    is_copied: bool,
}

impl<D: Driver> Logits for DeviceLogits<'_, D> {
    fn all(&mut self) -> Result<&mut [f32], DeviceError> {
        if !self.is_copied {
            let mut bytes = vec![0; self.vocab_size * 4];
            self.driver.read(self.memory, self.row * bytes.len(), &mut bytes)?;
            self.host.clear();
            self.host.extend(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)));
            self.is_copied = true;
        }
        Ok(self.host)
    }

    fn summary(&self) -> Option<Summary<'_>> {
        let num = usize::try_from(self.summary.num_candidates).unwrap_or(0).min(self.summary.ids.len());
        let log_sum = if self.summary.has_nan == 0 { self.summary.log_sum() } else { f64::NAN };
        Some(Summary { ids: &self.summary.ids[..num], logits: &self.summary.logits[..num], log_sum })
    }
}

impl<D: Driver> Cuda<D> {
    /// Waits for the `num` rows that the head has computed, and gives them away as numbers `first` and on.
    pub(super) fn give_logits(&mut self, first: usize, num: usize, caller: &mut dyn Caller) -> Result<(), DeviceError> {
        if num == 0 {
            return Ok(());
        }
        let vocab_size = self.shape().vocab_size;
        let mut host = std::mem::take(&mut self.host_logits);
        let StepMemory { buffers, .. } = self.step();
        let mut bytes = vec![0; num * RowSummary::BYTES];
        self.driver.read(buffers.memory(Buffer::Summaries), 0, &mut bytes)?;
        for (row, bytes) in bytes.as_chunks::<{ RowSummary::BYTES }>().0.iter().enumerate() {
            let mut logits = DeviceLogits {
                driver: &self.driver,
                memory: buffers.memory(Buffer::Logits),
                row,
                vocab_size,
                summary: &RowSummary::from_bytes(bytes),
                host: &mut host,
                is_copied: false,
            };
            caller.on_logits(first + row, &mut logits)?;
        }
        self.host_logits = host;
        Ok(())
    }
}
