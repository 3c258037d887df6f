//! Compiles the CUDA sources as C++, and the driver of tests as a library that is loaded.

use std::env;
use std::path::Path;

fn main() {
    for folder in ["../cuda", "."] {
        println!("cargo:rerun-if-changed={folder}");
    }
    let mut build = cc::Build::new();
    build.cpp(true).file("launch.cpp").include(".").include("../cuda").std("c++17");
    // Whatever the profile: the kernels are run, not debugged. FMA only where the source says so.
    build.opt_level(2).flag("-ffp-contract=off").flag_if_supported("-march=native");
    build.flag("-Wno-unknown-pragmas").compile("lorry_emulator");
    build_driver();
}

/// Under the name that NVIDIA's driver is looked for by, and in a folder of its own: cargo has every test look for libraries in
/// `OUT_DIR`, and only those that ask for this one may find it.
fn build_driver() {
    let folder = Path::new(&env::var("OUT_DIR").expect("cargo sets it")).join("driver");
    std::fs::create_dir_all(&folder).expect("OUT_DIR can be written");
    let library = folder.join("libcuda.so");
    let compiler = cc::Build::new().cpp(true).std("c++17").opt_level(1).pic(true).get_compiler();
    let mut command = compiler.to_command();
    command.args(["-shared", "-Wl,-soname,libcuda.so", "-o"]).arg(&library).arg("libcuda.cpp");
    let status = command.status().expect("the C++ compiler that has compiled the kernels");
    assert!(status.success(), "libcuda.cpp does not compile");
    println!("cargo:rustc-env=LORRY_TEST_DRIVER={}", library.display());
}
