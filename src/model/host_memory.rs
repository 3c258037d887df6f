//! What memory of the host this process can have, by the system and by its control groups.

use std::fs;
use std::path::Path;

/// Memory that this process can have without pushing others out: what the system has, or its control groups leave. `None` where
/// the system does not say.
pub fn available_bytes() -> Option<usize> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let system = line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()? << 10;
    Some(left_by_control_groups().map_or(system, |left| system.min(left)))
}

/// What the bounds of this process's control group, and of all that it is in, leave; `None` where there are none. The kernel ends
/// a process that takes more.
pub fn left_by_control_groups() -> Option<usize> {
    left_by(Path::new("/sys/fs/cgroup"), &fs::read_to_string("/proc/self/cgroup").ok()?)
}

/// `memberships` are lines of `hierarchy:controllers:group` (cgroups(7)); `mounts` is the folder of the hierarchies.
fn left_by(mounts: &Path, memberships: &str) -> Option<usize> {
    let of_line = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, group) = parts.next().zip(parts.next())?;
        match controllers {
            "" => Version::TWO.left_by_group_and_above(mounts, group),
            _ if controllers.split(',').any(|controller| controller == "memory") => {
                Version::ONE.left_by_group_and_above(&mounts.join("memory"), group)
            }
            _ => None,
        }
    };
    memberships.lines().filter_map(of_line).min()
}

/// The names of a group's files.
struct Version {
    limit: &'static str,
    usage: &'static str,
    /// Keys of `memory.stat`: pages of files, which make room for others.
    file_pages: [&'static str; 2],
}

impl Version {
    const ONE: Self = Self {
        limit: "memory.limit_in_bytes",
        usage: "memory.usage_in_bytes",
        file_pages: ["total_inactive_file ", "total_active_file "],
    };
    const TWO: Self =
        Self { limit: "memory.max", usage: "memory.current", file_pages: ["inactive_file ", "active_file "] };

    fn left_by_group_and_above(&self, root: &Path, group: &str) -> Option<usize> {
        let group = root.join(group.trim_start_matches('/'));
        group
            .ancestors()
            .take_while(|group| group.starts_with(root))
            .filter_map(|group| self.left_by_group(group))
            .min()
    }

    fn left_by_group(&self, group: &Path) -> Option<usize> {
        let number = |file: &str| fs::read_to_string(group.join(file)).ok()?.trim().parse::<usize>().ok();
        let (limit, usage) = number(self.limit).zip(number(self.usage))?;
        // Without a limit version 1 says the largest number of pages.
        if limit >= isize::MAX as usize >> 12 << 12 {
            return None;
        }
        let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
        let pages = |key| stat.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<usize>().ok());
        let reclaimable: usize = self.file_pages.into_iter().filter_map(pages).sum();
        Some(limit.saturating_sub(usage.saturating_sub(reclaimable)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(root: &Path, path: &str, files: &[(&str, &str)]) {
        fs::create_dir_all(root.join(path)).unwrap();
        files.iter().for_each(|(file, text)| fs::write(root.join(path).join(file), text).unwrap());
    }

    #[test]
    fn a_group_has_what_the_groups_around_it_leave() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let left = |group: &str| left_by(root, &format!("1:cpu:/elsewhere\n0::{group}\n"));
        group(root, "slice/service", &[("memory.max", "max\n"), ("memory.current", "500\n")]);
        assert_eq!([left("/slice/service"), left("/"), left("/elsewhere")], [None; 3]);
        group(root, "slice", &[("memory.max", "1000\n"), ("memory.current", "900\n")]);
        assert_eq!([left("/slice/service"), left("/slice"), left("")], [Some(100), Some(100), None]);
        group(root, "slice", &[("memory.stat", "anon 500\ninactive_file 330\nactive_file 20\n")]);
        assert_eq!(left("/slice/service"), Some(450));
        group(root, "slice/service", &[("memory.max", "600\n"), ("memory.stat", "")]);
        assert_eq!([left("/slice/service"), left("/slice")], [Some(100), Some(450)]);
        group(root, "", &[("memory.max", "70"), ("memory.current", "80")]);
        assert_eq!(left("/slice/service/not/seen/here"), Some(0));
    }

    #[test]
    fn groups_of_the_first_version_bound_as_well() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let left = |lines: &str| left_by(root, lines);
        let unlimited = "9223372036854771712\n";
        group(root, "memory", &[("memory.limit_in_bytes", unlimited), ("memory.usage_in_bytes", "7000\n")]);
        assert_eq!(left("4:memory:/\n0::/\n"), None);
        let stat = ("memory.stat", "inactive_file 1\ntotal_inactive_file 200\ntotal_active_file 100\n");
        group(root, "memory/a:b", &[("memory.limit_in_bytes", "1000"), ("memory.usage_in_bytes", "400"), stat]);
        assert_eq!(left("9:name=systemd:/\n4:memory:/a:b/within\n0::/\n"), Some(900));
        assert_eq!(left("4:cpu,memory:/a:b"), Some(900));
        assert_eq!([left("4:cpu:/a:b"), left(""), left("memory")], [None; 3]);
    }
}
