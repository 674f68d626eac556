//! What reads bytes that others may have written, configurations and records, on arbitrary and on
//! damaged ones: no panic, and no allocation out of proportion.
//!
//! More cases: `PROPTEST_CASES=1000000 cargo test --release --test fuzz`.

#![cfg(all(feature = "flex", feature = "autodiff"))]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        LazyLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use burn::{
    config::Config,
    module::Module,
    nn::LinearConfig,
    store::{ModuleRecord, RecordError},
    tensor::{Bytes, Device, Tensor},
};
use burn_memaop::{AopConfig, MemAopLinear, MemAopLinearConfig, Memory, Method, OuterProducts};
use proptest::{collection::vec, prelude::*, sample::Index};

/// The system's allocator, which remembers the largest request.
struct Watching;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Relaxed);
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Relaxed);
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

/// No input here is larger than some kilobytes, and nothing made of one should be much larger.
const MOST: usize = 16 << 20;

fn cases(default: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok();
    let cases = cases
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(default);
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// Some bytes of `whole` replaced, and perhaps its end cut off.
fn damaged(whole: &[u8], changes: &[(Index, u8)], length: Option<Index>) -> Vec<u8> {
    let mut bytes = whole.to_vec();
    for (index, byte) in changes {
        let at = index.index(bytes.len());
        bytes[at] = *byte;
    }
    if let Some(length) = length {
        bytes.truncate(length.index(whole.len() + 1));
    }
    bytes
}

fn changes() -> impl Strategy<Value = Vec<(Index, u8)>> {
    vec((any::<Index>(), any::<u8>()), 0..4)
}

fn read_configs(bytes: &[u8]) {
    if let Ok(config) = AopConfig::load_binary(bytes) {
        let _rule = config.validate();
        config.outer_products.k(100);
    }
}

static CONFIG: LazyLock<String> = LazyLock::new(|| {
    let aop = AopConfig::new().with_method(Method::TopK(Memory::Balanced { decay: 0.9 }));
    serde_json::to_string(&aop).unwrap()
});

fn layer() -> MemAopLinear {
    let aop = AopConfig::new()
        .with_outer_products(OuterProducts::Count(2))
        .with_method(Method::TopK(Memory::Balanced { decay: 0.9 }))
        .with_cost_rule(false);
    MemAopLinearConfig::new(3, 2)
        .init(&Device::flex().autodiff())
        .with_aop(aop)
}

fn auto() -> AopConfig {
    AopConfig::new()
        .with_input_gradient(OuterProducts::Auto)
        .with_saved_state(true)
        .with_cost_rule(false)
}

/// The record of a layer with a memory.
static RECORD: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let layer = layer();
    let input = Tensor::<2>::ones([5, 3], &Device::flex().autodiff());
    layer.forward(input).sum().backward();
    layer.into_record().into_bytes().unwrap().to_vec()
});

/// The record of a layer that chooses its K, with a measurement that has not been read.
static AUTO_RECORD: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let device = Device::flex().autodiff();
    let layer = layer().with_aop(auto());
    for _ in 0..15 {
        let input = Tensor::<2>::ones([40, 3], &device).require_grad();
        layer.forward(input).sum().backward();
    }
    layer.into_record().into_bytes().unwrap().to_vec()
});

/// Another device than Flex, where there is one.
#[allow(deprecated)]
fn other_device() -> Device {
    #[cfg(feature = "ndarray")]
    return Device::ndarray();
    #[cfg(not(feature = "ndarray"))]
    Device::flex()
}

/// The record of a layer that workers on two devices have trained.
static WORKERS_RECORD: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let layer = layer();
    for device in [Device::flex(), other_device()].map(Device::autodiff) {
        let fork = layer.clone().fork(&device);
        fork.forward(Tensor::<2>::ones([5, 3], &device))
            .sum()
            .backward();
    }
    layer.into_record().into_bytes().unwrap().to_vec()
});

/// Burn's loader panics on a parameter whose type has become another: so it does for `Linear`, and
/// there is nothing that a layer could do.
fn is_too_much_for_burn(record: ModuleRecord) -> bool {
    let device = Device::flex().autodiff();
    let load = || {
        let linear = LinearConfig::new(3, 2).init(&device);
        let loaded = linear.try_load_record(record.allow_unused(true))?;
        loaded
            .forward(Tensor::<2>::ones([5, 3], &device))
            .sum()
            .backward();
        Ok::<_, RecordError>(())
    };
    catch_unwind(AssertUnwindSafe(load)).is_err()
}

/// Reads a record, as it is or cast to the types of the layer, and uses the layer if it takes it.
fn read_record(bytes: &[u8], cast: bool) {
    let parse = || {
        let record = ModuleRecord::from_bytes(Bytes::from_bytes_vec(bytes.to_vec()))?;
        Ok::<_, RecordError>(match cast {
            true => record.cast_to_module_dtype(),
            false => record,
        })
    };
    let (Ok(record), Ok(copy)) = (parse(), parse()) else {
        return;
    };
    if is_too_much_for_burn(copy) {
        return;
    }
    let Ok(loaded) = layer().try_load_record(record) else {
        return;
    };
    let input = Tensor::<2>::ones([5, 3], &Device::flex().autodiff());
    loaded.forward(input.clone()).sum().backward();
    loaded.memory_stats();
    // Whatever was measured, the choice of K goes on.
    let loaded = loaded.with_aop(auto());
    for rows in [40; 11].into_iter().chain([5]) {
        let input = Tensor::<2>::ones([rows, 3], &Device::flex().autodiff());
        loaded.forward(input).sum().backward();
    }
    assert!((1..=5).contains(&loaded.memory_stats().k));
}

fn bounded(read: impl FnOnce()) {
    LARGEST.store(0, Relaxed);
    read();
    let largest = LARGEST.load(Relaxed);
    assert!(largest < MOST, "{largest} bytes were asked for");
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn arbitrary_bytes_are_no_config(bytes in vec(any::<u8>(), 0..256)) {
        bounded(|| read_configs(&bytes));
    }

    #[test]
    fn damaged_configs_are_refused_or_valid(changes in changes(), length: Option<Index>) {
        bounded(|| read_configs(&damaged(CONFIG.as_bytes(), &changes, length)));
    }

    #[test]
    fn arbitrary_bytes_are_no_record(bytes in vec(any::<u8>(), 0..512), cast: bool) {
        bounded(|| read_record(&bytes, cast));
    }
}

proptest! {
    #![proptest_config(cases(1000))]

    #[test]
    fn damaged_records_are_refused_or_loaded(
        changes in changes(),
        length: Option<Index>,
        of in 0..3usize,
        cast: bool,
    ) {
        let whole = [&RECORD, &AUTO_RECORD, &WORKERS_RECORD][of];
        let bytes = damaged(whole, &changes, length);
        bounded(|| read_record(&bytes, cast));
    }
}

#[test]
fn what_is_damaged_is_whole_before() {
    AopConfig::load_binary(CONFIG.as_bytes()).unwrap();
    let record = ModuleRecord::from_bytes(Bytes::from_bytes_vec(RECORD.clone())).unwrap();
    let loaded = layer().try_load_record(record).unwrap();
    assert_eq!(loaded.memory_stats().pending, 3);
    let record = ModuleRecord::from_bytes(Bytes::from_bytes_vec(AUTO_RECORD.clone())).unwrap();
    assert_eq!(record.len(), 4, "parameters, header and content");
    let record = ModuleRecord::from_bytes(Bytes::from_bytes_vec(WORKERS_RECORD.clone())).unwrap();
    assert_eq!(record.len(), 4, "the same for several devices");
    let loaded = layer().try_load_record(record).unwrap();
    assert_eq!(loaded.memory_stats().pending, 3);
}

#[test]
fn a_memory_of_another_type_is_refused() {
    let mut bytes = RECORD.clone();
    let integers = bytes.windows(3).filter(|window| window == b"I32").count();
    assert_eq!(integers, 2, "header and content");
    let at = bytes
        .windows(3)
        .position(|window| window == b"I32")
        .unwrap();
    bytes[at] = b'U';
    let record = ModuleRecord::from_bytes(Bytes::from_bytes_vec(bytes)).unwrap();
    let error = layer().try_load_record(record).unwrap_err().to_string();
    assert!(error.contains("memory"), "{error}");
}

/// The length that a damaged header tells of is compared, and not allocated.
#[test]
fn a_damaged_header_allocates_nothing() {
    let whole: &Vec<u8> = &RECORD;
    let headers = whole.windows(8).enumerate().filter(|(_, bytes)| {
        let [version, length] =
            [0, 4].map(|at| i32::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte])));
        version == 2 && (300..600).contains(&length)
    });
    let headers: Vec<_> = headers.map(|(at, _)| at).collect();
    assert_eq!(headers.len(), 1, "the state of the memory");
    let mut refused = 0;
    for length in [i32::MIN, -1, 3, 1 << 24, i32::MAX] {
        let mut bytes = whole.clone();
        bytes[headers[0] + 4..headers[0] + 8].copy_from_slice(&length.to_le_bytes());
        for cast in [false, true] {
            bounded(|| {
                let record = ModuleRecord::from_bytes(Bytes::from_bytes_vec(bytes.clone()));
                let record = match cast {
                    true => record.unwrap().cast_to_module_dtype(),
                    false => record.unwrap(),
                };
                let error = layer().try_load_record(record).unwrap_err().to_string();
                assert!(error.contains("memory."), "{error}");
                refused += 1;
            });
        }
    }
    assert_eq!(refused, 10);
}
