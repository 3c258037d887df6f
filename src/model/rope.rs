//! How a model's heads turn with their position, and what its file makes of that beyond `theta^(-2i/dims)`.

use std::f64::consts::TAU;

use kernels::shape::Rotary;

/// Changes of the rotary frequencies, as far as a file names them.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeScaling {
    /// What every position is divided by ("linear", Chen et al. 2023).
    pub factor: f32,
    /// What each frequency is divided by beside that, `[dims / 2]`; empty where there is nothing (Llama 3's).
    pub divisors: Vec<f32>,
    /// Which frequencies the factor spares.
    pub yarn: Option<Yarn>,
    /// Divisors of short and of long contexts, in place of `divisors`.
    pub long_rope: Option<LongRope>,
    /// What cosines and sines are multiplied by.
    pub magnitude: f32,
}

impl RopeScaling {
    pub const NONE: Self = Self { factor: 1.0, divisors: Vec::new(), yarn: None, long_rope: None, magnitude: 1.0 };
}

/// Turns within the original context from which on a frequency is left alone, and up to which it is divided whole (Peng et
/// al. 2023).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    pub original_context_length: usize,
    pub beta_fast: f32,
    pub beta_slow: f32,
}

/// LongRoPE (Ding et al. 2024): the longest context a server allows decides for all of its sequences, so that what is
/// cached of a shorter one stays right.
#[derive(Debug, Clone, PartialEq)]
pub struct LongRope {
    pub original_context_length: usize,
    /// `[dims / 2]` each.
    pub short: Vec<f32>,
    pub long: Vec<f32>,
}

impl RopeScaling {
    /// The frequencies of `dims` dimensions in contexts of up to `context_length` positions.
    pub fn rotary(&self, dims: usize, theta: f32, context_length: usize) -> Rotary {
        let mut rotary = Rotary::plain(dims, theta);
        let divisors = match &self.long_rope {
            Some(rope) if context_length > rope.original_context_length => &rope.long,
            Some(rope) => &rope.short,
            None => &self.divisors,
        };
        rotary.frequencies.iter_mut().zip(divisors).for_each(|(frequency, divisor)| *frequency /= f64::from(*divisor));
        let factor = f64::from(self.factor);
        for (i, frequency) in rotary.frequencies.iter_mut().enumerate() {
            let spared = self.yarn.map_or(0.0, |yarn| yarn.share_spared(i, dims, theta));
            *frequency = *frequency * spared + *frequency / factor * (1.0 - spared);
        }
        rotary.magnitude = f64::from(self.magnitude);
        if self.yarn.is_some() && factor > 1.0 {
            rotary.magnitude *= 0.1 * factor.ln() + 1.0;
        }
        rotary
    }
}

impl Yarn {
    /// How much of frequency `i` of `dims / 2` keeps its value: 1 for the fast, 0 for the slow.
    fn share_spared(self, i: usize, dims: usize, theta: f32) -> f64 {
        let context = self.original_context_length as f64;
        // The frequency that turns so often within the original context.
        let place =
            |turns: f32| dims as f64 * (context / (f64::from(turns) * TAU)).ln() / (2.0 * f64::from(theta).ln());
        let low = place(self.beta_fast).floor().max(0.0);
        let high = place(self.beta_slow).ceil().min(dims as f64 - 1.0);
        let ramp = (i as f64 - low) / (high - low).max(0.001);
        1.0 - ramp.clamp(0.0, 1.0)
    }
}
