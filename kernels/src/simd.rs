//! f32 lanes in vector registers or in a plain array, so that every f32 kernel is written once.
//!
//! A kernel is a generic `#[inline(always)]` function over [`Simd`], which has eight lanes with every instruction set; [`dispatch`]
//! instantiates it inside a function that carries the target features. Lane order is the same in all, so they differ only by
//! FMA's single rounding. What gains by sixteen lanes is written over [`Lanes`], for [`dispatch_widest`].

#[cfg(target_arch = "x86_64")]
mod avx512;

use half::f16;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;

/// Bytes that memory gives at once.
#[cfg(target_arch = "x86_64")]
pub(crate) const LINE: usize = 64;

/// Some f32 lanes.
pub(crate) trait Lanes: Copy {
    const COUNT: usize;
    fn splat(v: f32) -> Self;
    /// Reads `source[..COUNT]`.
    fn load(source: &[f32]) -> Self;
    /// Reads `source[..COUNT]`, widened.
    fn load_f16(source: &[f16]) -> Self;
    /// Reads `source[..COUNT]`, whole numbers with a sign.
    fn load_i8(source: &[u8]) -> Self;
    /// Writes `target[..COUNT]`.
    fn store(self, target: &mut [f32]);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    fn max(self, other: Self) -> Self;
    fn abs(self) -> Self;
    /// `self * factor + addend`
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// Rounded to the nearest whole number, ties to even.
    fn round(self) -> Self;
    /// `2^self` for whole numbers in -126..=127.
    fn exp2_whole(self) -> Self;
    /// Sum of the lanes, pairwise.
    fn sum(self) -> f32;
    fn max_lane(self) -> f32;

    /// `e^self`, within 2 units in the last place for -87..=88 and clamped to that range; arguments below give 0.
    ///
    /// Range reduction by `n = round(x / ln 2)` and a degree-6 polynomial on `[-ln 2 / 2, ln 2 / 2]` (Cephes `expf`).
    #[inline(always)]
    fn exp(self) -> Self {
        const LOWEST: f32 = -87.0;
        let x = self.max(Self::splat(LOWEST));
        let x = Self::splat(0.0).sub(Self::splat(0.0).sub(x).max(Self::splat(-88.0)));
        let n = x.mul(Self::splat(std::f32::consts::LOG2_E)).round();
        let r = n.mul_add(Self::splat(-0.693_359_4), x);
        let r = n.mul_add(Self::splat(2.121_944_4e-4), r);
        let mut p = Self::splat(1.987_569_1e-4);
        for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
            p = p.mul_add(r, Self::splat(c));
        }
        let y = p.mul_add(r.mul(r), r.add(Self::splat(1.0)));
        y.mul(n.exp2_whole())
    }

    /// Within 2e-7 of it.
    #[inline(always)]
    fn tanh(self) -> Self {
        let one = Self::splat(1.0);
        one.sub(Self::splat(2.0).div(one.add(self.add(self).exp())))
    }

    /// `1 / (1 + e^-self)`
    #[inline(always)]
    fn sigmoid(self) -> Self {
        let one = Self::splat(1.0);
        one.div(one.add(Self::splat(0.0).sub(self).exp()))
    }
}

/// Eight f32 lanes.
pub(crate) trait Simd: Lanes {
    fn to_array(self) -> [f32; 8];
    /// Writes `target[..8]`, rounded to nearest.
    fn store_f16(self, target: &mut [f16]);
    /// Writes 32 values, rounded to the nearest whole number in -127..=127, to `target[..32]`.
    fn store_i8(lanes: [Self; 4], target: &mut [i8]);
}

#[inline(always)]
fn sum_of(lanes: impl Simd) -> f32 {
    let a = lanes.to_array();
    ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))
}

#[inline(always)]
fn max_of(lanes: impl Simd) -> f32 {
    lanes.to_array().into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// Plain Rust lanes.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 8]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl Lanes for Portable {
    const COUNT: usize = 8;
    #[inline(always)]
    fn splat(v: f32) -> Self {
        Self([v; 8])
    }
    #[inline(always)]
    fn load(source: &[f32]) -> Self {
        Self(std::array::from_fn(|i| source[i]))
    }
    #[inline(always)]
    fn load_f16(source: &[f16]) -> Self {
        Self(std::array::from_fn(|i| source[i].to_f32()))
    }
    #[inline(always)]
    fn load_i8(source: &[u8]) -> Self {
        Self(std::array::from_fn(|i| f32::from(source[i] as i8)))
    }
    #[inline(always)]
    fn store(self, target: &mut [f32]) {
        target[..8].copy_from_slice(&self.0);
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn abs(self) -> Self {
        Self(self.0.map(f32::abs))
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * factor.0[i] + addend.0[i]))
    }
    #[inline(always)]
    fn round(self) -> Self {
        Self(self.0.map(f32::round_ties_even))
    }
    #[inline(always)]
    fn exp2_whole(self) -> Self {
        Self(self.0.map(|v| f32::from_bits(((v as i32 + 127) as u32) << 23)))
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        sum_of(self)
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        max_of(self)
    }
}

impl Simd for Portable {
    #[inline(always)]
    fn to_array(self) -> [f32; 8] {
        self.0
    }
    #[inline(always)]
    fn store_f16(self, target: &mut [f16]) {
        for (t, v) in target[..8].iter_mut().zip(self.0) {
            *t = f16::from_f32(v);
        }
    }
    #[inline(always)]
    fn store_i8(lanes: [Self; 4], target: &mut [i8]) {
        for (lane, target) in lanes.into_iter().zip(target[..32].chunks_exact_mut(8)) {
            for (t, v) in target.iter_mut().zip(lane.0) {
                *t = v.round_ties_even() as i8;
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::Avx2;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::f16;

    use super::{Lanes, Simd, max_of, sum_of};

    /// AVX2, FMA and F16C lanes. Values exist only inside functions entered through `dispatch!`, which has checked that
    /// the processor has these features: that is the reason for every `unsafe` below.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256);

    // SAFETY of all blocks: the features are present (see `Avx2`), and slices are cut to eight elements before their
    // pointer is used.
    impl Lanes for Avx2 {
        const COUNT: usize = 8;
        #[inline(always)]
        fn splat(v: f32) -> Self {
            Self(unsafe { _mm256_set1_ps(v) })
        }
        #[inline(always)]
        fn load(source: &[f32]) -> Self {
            Self(unsafe { _mm256_loadu_ps(source[..8].as_ptr()) })
        }
        #[inline(always)]
        fn load_f16(source: &[f16]) -> Self {
            Self(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(source[..8].as_ptr().cast())) })
        }
        #[inline(always)]
        fn load_i8(source: &[u8]) -> Self {
            unsafe {
                let bytes = _mm_loadl_epi64(source[..8].as_ptr().cast());
                Self(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)))
            }
        }
        #[inline(always)]
        fn store(self, target: &mut [f32]) {
            unsafe { _mm256_storeu_ps(target[..8].as_mut_ptr(), self.0) }
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            Self(unsafe { _mm256_add_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            Self(unsafe { _mm256_sub_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            Self(unsafe { _mm256_mul_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn div(self, other: Self) -> Self {
            Self(unsafe { _mm256_div_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn max(self, other: Self) -> Self {
            Self(unsafe { _mm256_max_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn abs(self) -> Self {
            Self(unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), self.0) })
        }
        #[inline(always)]
        fn mul_add(self, factor: Self, addend: Self) -> Self {
            Self(unsafe { _mm256_fmadd_ps(self.0, factor.0, addend.0) })
        }
        #[inline(always)]
        fn round(self) -> Self {
            Self(unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
        }
        #[inline(always)]
        fn exp2_whole(self) -> Self {
            unsafe {
                let biased = _mm256_add_epi32(_mm256_cvtps_epi32(self.0), _mm256_set1_epi32(127));
                Self(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased)))
            }
        }
        #[inline(always)]
        fn sum(self) -> f32 {
            sum_of(self)
        }
        #[inline(always)]
        fn max_lane(self) -> f32 {
            max_of(self)
        }
    }

    // SAFETY of all blocks: as above.
    impl Simd for Avx2 {
        #[inline(always)]
        fn to_array(self) -> [f32; 8] {
            let mut lanes = [0.0; 8];
            self.store(&mut lanes);
            lanes
        }
        #[inline(always)]
        fn store_f16(self, target: &mut [f16]) {
            unsafe {
                let half = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
                _mm_storeu_si128(target[..8].as_mut_ptr().cast(), half);
            }
        }
        #[inline(always)]
        fn store_i8(lanes: [Self; 4], target: &mut [i8]) {
            unsafe {
                let [a, b, c, d] = lanes.map(|lane| _mm256_cvtps_epi32(lane.0));
                let packed = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
                // The packs work within 128-bit halves: bring the groups of four bytes back into order.
                let ordered = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
                _mm256_storeu_si256(target[..32].as_mut_ptr().cast(), ordered);
            }
        }
    }
}

/// Calls the generic kernel `$kernel::<S>($args)` for the lanes of `$isa`.
macro_rules! dispatch {
    ($isa:expr, $kernel:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        #[allow(clippy::too_many_arguments)] // forwards the kernel's own arguments
        fn avx2($($arg: $ty),*) $(-> $ret)? {
            $kernel::<$crate::simd::Avx2>($($arg),*)
        }
        match $isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Cpu` never holds an instruction set the processor lacks.
            $crate::Isa::Avx2 | $crate::Isa::AvxVnni | $crate::Isa::Avx512Vnni => unsafe { avx2($($arg),*) },
            _ => $kernel::<$crate::simd::Portable>($($arg),*),
        }
    }};
}
pub(crate) use dispatch;

/// As [`dispatch`], with the most lanes that `$isa` has.
macro_rules! dispatch_widest {
    ($isa:expr, $kernel:ident($($arg:ident: $ty:ty),* $(,)?)) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
        fn avx512($($arg: $ty),*) {
            $kernel::<$crate::simd::Avx512>($($arg),*)
        }
        match $isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Cpu` never holds an instruction set the processor lacks.
            $crate::Isa::Avx512Vnni => unsafe { avx512($($arg),*) },
            isa => $crate::simd::dispatch!(isa, $kernel($($arg: $ty),*)),
        }
    }};
}
pub(crate) use dispatch_widest;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[inline(always)]
    fn exp_of<S: Lanes>(values: &mut [f32]) {
        for chunk in values.chunks_exact_mut(S::COUNT) {
            S::load(chunk).exp().store(chunk);
        }
    }

    #[test]
    fn exp_is_close_to_the_standard_library() {
        for isa in Isa::available() {
            let xs: Vec<f32> = (-8000..8000).map(|i| i as f32 * 0.01087).collect();
            let mut ys = xs.clone();
            let values = &mut ys[..];
            dispatch_widest!(isa, exp_of(values: &mut [f32]));
            for (x, y) in xs.iter().zip(&ys) {
                let expected = x.clamp(-87.0, 88.0).exp();
                assert!((y - expected).abs() <= expected * 4e-7, "{isa}: exp({x}) = {y}, expected {expected}");
            }
        }
    }
}
