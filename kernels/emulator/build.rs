//! Compiles the CUDA sources as C++.

fn main() {
    for folder in ["../cuda", "."] {
        println!("cargo:rerun-if-changed={folder}");
    }
    let mut build = cc::Build::new();
    build.cpp(true).file("launch.cpp").include(".").include("../cuda").std("c++17");
    // Whatever the profile: the kernels are run, not debugged. FMA only where the source says so.
    build.opt_level(2).flag("-ffp-contract=off").flag_if_supported("-march=native");
    build.flag("-Wno-unknown-pragmas").compile("lorry_emulator");
}
