//! How the heap treats large blocks.

/// Larger than what is taken again and again, as the logits of a row are; smaller than the bodies that few requests have.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const LARGE_BYTES: libc::c_int = 1 << 20;

/// Makes the heap give blocks of 1 MiB and more back to the system as soon as they are freed. glibc would do so at first, and
/// then, when it has seen larger ones come and go, keep up to 32 MiB at a time for the next, of each thread. For the whole
/// process; elsewhere than with glibc it does nothing.
pub fn give_back_large_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // Setting the one of them leaves the other at 128 KiB, and every smaller block would be asked of the system anew.
        for parameter in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
            // SAFETY: it changes a number of the allocator, under the allocator's own lock; memory in use stays as it is.
            unsafe { libc::mallopt(parameter, LARGE_BYTES) };
        }
    }
}
