use std::arch::x86_64::*;

use half::f16;

use super::Lanes;

/// Sixteen lanes of AVX-512. Values exist only inside functions entered through `dispatch_widest!`, which has checked that the
/// processor has the features: that is the reason for every `unsafe` below.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512);

// SAFETY of all blocks: the features are present (see `Avx512`), and slices are cut to sixteen elements before their pointer
// is used.
impl Lanes for Avx512 {
    const COUNT: usize = 16;
    #[inline(always)]
    fn splat(v: f32) -> Self {
        Self(unsafe { _mm512_set1_ps(v) })
    }
    #[inline(always)]
    fn load(source: &[f32]) -> Self {
        Self(unsafe { _mm512_loadu_ps(source[..16].as_ptr()) })
    }
    #[inline(always)]
    fn load_f16(source: &[f16]) -> Self {
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(source[..16].as_ptr().cast())) })
    }
    #[inline(always)]
    fn load_i8(source: &[u8]) -> Self {
        unsafe {
            let bytes = _mm_loadu_si128(source[..16].as_ptr().cast());
            Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)))
        }
    }
    #[inline(always)]
    fn store(self, target: &mut [f32]) {
        unsafe { _mm512_storeu_ps(target[..16].as_mut_ptr(), self.0) }
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(unsafe { _mm512_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self(unsafe { _mm512_div_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn abs(self) -> Self {
        Self(unsafe { _mm512_abs_ps(self.0) })
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
    }
    #[inline(always)]
    fn round(self) -> Self {
        Self(unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
    }
    #[inline(always)]
    fn exp2_whole(self) -> Self {
        unsafe {
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased)))
        }
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        unsafe { _mm512_reduce_add_ps(self.0) }
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        unsafe { _mm512_reduce_max_ps(self.0) }
    }
}
