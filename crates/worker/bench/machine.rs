//! What the system knows about this process, where it has /proc.

/// Ticks of a second in /proc/PID/stat: Linux has shown programs this many since 2.4, whatever the kernel counts in.
const TICKS_PER_SECOND: f64 = 100.0;

/// The process's largest resident memory.
pub(super) fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kb| kb * 1024)
}

/// Seconds of processors that all threads of the process have had.
pub(super) fn processor_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is the program's name in brackets, and may hold anything.
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks = |field: usize| fields.split_whitespace().nth(field)?.parse::<f64>().ok();
    // utime and stime are fields 14 and 15, from 1.
    Some((ticks(11)? + ticks(12)?) / TICKS_PER_SECOND)
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn seconds_of_the_processor_are_those_that_were_used() {
        let (before, start) = (processor_seconds().unwrap(), Instant::now());
        // Other tests use the processor too: only the least is known.
        while processor_seconds().unwrap() - before < 0.1 {
            assert!(start.elapsed() < Duration::from_secs(60), "a busy loop used no processor");
        }
        assert!(start.elapsed() > Duration::from_millis(5), "a tenth of a second of all cores came at once");
    }
}
