//! The program of all kernels as the binary carries it: compressed PTX, which a driver compiles for its card.
//!
//! `make ptx` writes it from `kernels/cuda`. It says of each kernel what a launch must know.

use std::collections::HashMap;
use std::io::Read;

use flate2::read::GzDecoder;

const COMPRESSED: &[u8] = include_bytes!("../../cuda/kernels.ptx.gz");

/// How a kernel is launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Of a block.
    pub threads: u32,
    /// Of its argument.
    pub argument_bytes: usize,
}

/// The PTX. Its first line names the hash of the sources.
pub fn text() -> String {
    let mut text = String::new();
    // What is compiled in is what the tests have read.
    GzDecoder::new(COMPRESSED).read_to_string(&mut text).expect("the embedded PTX is whole");
    text
}

/// The kernels of `ptx` by name. What is not written as NVRTC writes it is left out.
pub fn entries(ptx: &str) -> HashMap<String, Entry> {
    ptx.split(".entry ").skip(1).filter_map(entry).collect()
}

/// `name(\n .param .align 8 .b8 name_param_0[16]\n)\n.maxntid 256, 1, 1\n…`
fn entry(ptx: &str) -> Option<(String, Entry)> {
    let (name, rest) = ptx.split_once('(')?;
    let (parameter, rest) = rest.split_once(')')?;
    let (_, bytes) = parameter.trim_end().strip_suffix(']')?.split_once('[')?;
    let threads = rest.trim_start().strip_prefix(".maxntid ")?.split(',').next()?;
    Some((name.to_owned(), Entry { threads: threads.parse().ok()?, argument_bytes: bytes.parse().ok()? }))
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};
    use std::path::Path;

    use super::*;

    /// As `source_hash` of `kernels/cuda/ptx.py`.
    fn hash_of_sources() -> String {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
        let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "cu" || extension == "cuh"));
        paths.sort();
        let mut hash = Sha256::new();
        for path in paths {
            hash.update(path.file_name().unwrap().as_encoded_bytes());
            hash.update([0]);
            hash.update(std::fs::read(&path).unwrap());
            hash.update([0]);
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn the_embedded_ptx_is_of_these_sources() {
        let text = text();
        let first = text.lines().next().unwrap();
        assert_eq!(first, format!("// sources {}", hash_of_sources()), "kernels/cuda has changed: run `make ptx`");
    }

    #[test]
    fn every_kernel_of_the_ptx_says_how_it_is_launched() {
        let text = text();
        let entries = entries(&text);
        assert_eq!(entries.len(), text.matches(".entry ").count());
        for (name, entry) in entries {
            assert!(entry.threads.is_multiple_of(32) && (32..=1024).contains(&entry.threads), "{name}: {entry:?}");
        }
    }

    #[test]
    fn an_entry_is_read_as_nvrtc_writes_it() {
        let ptx = ".visible .entry sum(\n\t.param .align 8 .b8 sum_param_0[24]\n)\n.maxntid 256, 1, 1\n{\n\tret;\n}\n";
        assert_eq!(entries(ptx), HashMap::from([("sum".to_owned(), Entry { threads: 256, argument_bytes: 24 })]));
        assert_eq!(entries(".entry bare(\n)\n{\n}\n"), HashMap::new());
    }
}
