//! NVIDIA's driver as it is, or is not, on the machine that tests.

use kernels::cuda::driver::Driver;
use kernels::cuda::nvidia::{Nvidia, OpenError};

#[test]
fn without_a_card_there_is_a_sentence_and_no_panic() {
    match (Nvidia::first_usable(), Nvidia::open(0)) {
        (Ok(_), Ok(nvidia)) => println!("skipped: {} is here", nvidia.name()),
        (usable, opened) => {
            let error = usable.err().or(opened.err()).expect("one of them failed").to_string();
            assert!(!error.is_empty() && !error.contains('\n'), "{error}");
        }
    }
}

#[test]
fn no_machine_has_so_many_cards() {
    match Nvidia::open(usize::MAX) {
        Err(
            OpenError::NoSuchDevice { index: usize::MAX, .. } | OpenError::NoDriver | OpenError::DriverTooOld { .. },
        ) => {}
        other => panic!("{other:?}"),
    }
}
