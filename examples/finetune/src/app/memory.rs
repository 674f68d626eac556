//! An allocator that counts the bytes of the process.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

/// The system's allocator, which counts the bytes that are allocated. A program that counts has one
/// as its `#[global_allocator]`.
pub struct Counting;

static ALIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The bytes that are allocated now.
pub fn alive() -> usize {
    ALIVE.load(Relaxed)
}

/// The most bytes that were allocated at once since [`watch_peak`].
pub fn peak() -> usize {
    PEAK.load(Relaxed)
}

/// Begins to look for a new [`peak`].
pub fn watch_peak() {
    PEAK.store(alive(), Relaxed);
}

fn count(more: usize, less: usize) {
    let before = ALIVE.fetch_add(more, Relaxed);
    PEAK.fetch_max(before + more, Relaxed);
    ALIVE.fetch_sub(less, Relaxed);
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // The old and the new block can both be there for a moment.
        count(size, layout.size());
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(0, layout.size());
        unsafe { System.dealloc(block, layout) }
    }
}
