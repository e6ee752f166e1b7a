// SPDX-License-Identifier: MIT
//
// A GPU for machines without one: a ggml device whose stream is a thread that computes with the CPU backend after
// random delays, and a link to it (native/src/link/link_api.h), whose streams are such threads too. Its memory is
// ordinary memory that is not declared as host memory. Nothing waits for anything unless it is told to, so a missing
// event shows as a wrong logit.
//
//   LATE_DEVICES=2 number of devices, LATE0 and LATE1; one by default
//   LATE_MEMORY=n  bytes of memory of all devices together; 4 GiB by default
//   LATE_LOST=n    bytes that are reported as free but cannot be allocated, as with fragmentation
//   LATE_US=300    longest delay before each operation of a stream, in microseconds
//   LATE_PIECES=4  number of pieces that are prefetched before their lookup comes; all by default
//   LATE_LOCK      none: no host memory can be page-locked; new: only new memory; default: not as read-only
//   LATE_FAIL=n    the n-th copy or lookup on the link since this was set fails
//   LATE_WILD      every routing that the link sees names an expert that no layer has
//   LATE_EVENTS    none: there are no events, as in a CUDA backend that was built without peer copies; n: creating the
//                  n-th event since this was set fails
//   LATE_OPEN      none: the link cannot be opened
//   LATE_NEW=n     the n-th allocation of page-locked memory since this was set fails
//
// The link copies only between device and page-locked memory, and refuses to page-lock memory twice.

#include "link/link_api.h"

#include "ggml-backend-impl.h"
#include "ggml-cpp.h"
#include "ggml-impl.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace {

long knob(const char * name) {
    const char * text = getenv(name);
    return text != nullptr ? atol(text) : 0;
}

// Whether this is the n-th call since the knob was set to n.
class nth {
  public:
    explicit nth(const char * name) : name_(name) {}
    bool now() {
        const std::lock_guard<std::mutex> lock(mutex_);
        const long                        asked = knob(name_);
        n_                                      = asked == since_ ? n_ + 1 : 1;
        since_                                  = asked;
        return n_ == asked;
    }

  private:
    const char * name_;
    std::mutex   mutex_;
    long         since_ = 0, n_ = 0;
};

// ---- streams and events

struct event {
    std::mutex              mutex;
    std::condition_variable changed;
    uint64_t                recorded = 0;
    uint64_t                passed   = 0;

    void pass(uint64_t ticket) {
        const std::lock_guard<std::mutex> lock(mutex);
        passed = std::max(passed, ticket);
        changed.notify_all();
    }
    void await(uint64_t ticket) {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [&] { return passed >= ticket; });
    }
    uint64_t now(bool record) {
        const std::lock_guard<std::mutex> lock(mutex);
        return recorded += record;
    }
};

class stream {
  public:
    explicit stream(unsigned seed) : chance_(seed), thread_([this] { work(); }) {}
    ~stream() {
        put({});
        thread_.join();
    }
    void put(std::function<void()> what) {
        const std::lock_guard<std::mutex> lock(mutex_);
        queue_.push_back(std::move(what));
        changed_.notify_all();
    }
    void record(event & mark) {
        put([&mark, ticket = mark.now(true)] { mark.pass(ticket); });
    }
    void wait(event & mark) {
        put([&mark, ticket = mark.now(false)] { mark.await(ticket); });
    }
    void synchronize() {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return queue_.empty(); });
    }

  private:
    void work() {
        const long most = knob("LATE_US");
        for (bool on = true; on;) {
            std::unique_lock<std::mutex> lock(mutex_);
            changed_.wait(lock, [&] { return !queue_.empty(); });
            const std::function<void()> what = queue_.front();
            lock.unlock();
            if (most > 0) {
                std::this_thread::sleep_for(std::chrono::microseconds(chance_() % most));
            }
            on = (bool) what;
            if (on) {
                what();
            }
            lock.lock();
            queue_.pop_front(); // only when it is done: synchronize() waits for an empty queue
            changed_.notify_all();
        }
    }

    std::mutex                        mutex_;
    std::condition_variable           changed_;
    std::deque<std::function<void()>> queue_;
    std::minstd_rand                  chance_;
    std::thread                       thread_;
};

// ---- memory that the link may copy from and to: the devices' memory and page-locked memory

class ranges {
  public:
    bool add(const void * begin, size_t size) { // false: it overlaps a known range
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto                        after = sizes_.upper_bound((const char *) begin);
        const bool there = (after != sizes_.end() && after->first < (const char *) begin + size) ||
                           (after != sizes_.begin() && end_of(std::prev(after)) > begin);
        if (!there) {
            sizes_[(const char *) begin] = size;
        }
        return !there;
    }
    void remove(const void * begin) {
        const std::lock_guard<std::mutex> lock(mutex_);
        sizes_.erase((const char *) begin);
    }
    bool has(const void * begin, size_t size) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto                        after = sizes_.upper_bound((const char *) begin);
        return after != sizes_.begin() && end_of(std::prev(after)) >= (const char *) begin + size;
    }

  private:
    using sizes = std::map<const char *, size_t>;
    static const char * end_of(sizes::const_iterator it) { return it->first + it->second; }

    std::mutex mutex_;
    sizes      sizes_;
};

ranges known;

// ---- buffers

// One device and its buffer type; it is the context of both.
struct late {
    const char *             name;
    const char *             id;
    ggml_backend_device      device;
    ggml_backend_buffer_type buft;
};

template <typename T> late & late_of(T * owned) {
    return *(late *) owned->context;
}

ggml_backend_dev_t cpu() {
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

std::atomic<size_t> taken{ 0 }; // bytes, of all devices

size_t memory_of_all() {
    const long given = knob("LATE_MEMORY");
    return given > 0 ? (size_t) given : (size_t) 4 << 30;
}

const ggml_backend_buffer_i buffer_i = {
    /* .free_buffer   = */
    [](ggml_backend_buffer_t buffer) {
        taken -= buffer->size;
        known.remove(buffer->context);
        free(buffer->context);
    },
    /* .get_base      = */ [](ggml_backend_buffer_t buffer) { return buffer->context; },
    /* .init_tensor   = */ nullptr,
    /* .memset_tensor = */
    [](ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
        memset((char *) tensor->data + offset, value, size);
    },
    /* .set_tensor    = */
    [](ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
        memcpy((char *) tensor->data + offset, data, size);
    },
    /* .get_tensor    = */
    [](ggml_backend_buffer_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
        memcpy(data, (const char *) tensor->data + offset, size);
    },
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ nullptr,
    /* .clear         = */
    [](ggml_backend_buffer_t buffer, uint8_t value) { memset(buffer->context, value, buffer->size); },
    /* .reset         = */ nullptr,
};

const ggml_backend_buffer_type_i buft_i = {
    /* .get_name       = */ [](ggml_backend_buffer_type_t buft) { return late_of(buft).name; },
    /* .alloc_buffer   = */
    [](ggml_backend_buffer_type_t buft, size_t size) -> ggml_backend_buffer_t {
        if (taken + size + knob("LATE_LOST") > memory_of_all()) {
            return nullptr;
        }
        taken += size;
        void * memory = aligned_alloc(128, (size + 127) / 128 * 128 + 128);
        memset(memory, 0xff, size); // NaN, so that a read before the first write shows
        known.add(memory, size);
        return ggml_backend_buffer_init(buft, buffer_i, memory, size);
    },
    /* .get_alignment  = */ [](ggml_backend_buffer_type_t) { return (size_t) 128; },
    /* .get_max_size   = */ nullptr,
    /* .get_alloc_size = */ nullptr,
    /* .is_host        = */ nullptr,
};

// ---- backend

struct late_backend {
    ggml_backend_ptr cpu;
    stream           queue{ 1 };
};

late_backend & self(ggml_backend_t backend) {
    return *(late_backend *) backend->context;
}

// A copy of the nodes and their sources: the caller may change them once graph_compute() has returned.
struct frozen_graph {
    ggml_context_ptr                                                      context;
    std::unordered_map<const ggml_tensor *, std::unique_ptr<ggml_tensor>> copies;
    ggml_cgraph *                                                         graph;

    explicit frozen_graph(const ggml_cgraph * from) :
        context(ggml_init({ ggml_graph_overhead_custom(from->n_nodes * 4 + 64, false), nullptr, true })),
        graph(ggml_new_graph_custom(context.get(), from->n_nodes * 4 + 64, false)) {
        for (int i = 0; i < from->n_nodes; i++) {
            ggml_tensor * node    = copy(from->nodes[i]);
            graph->nodes[i]       = node;
            const size_t at       = ggml_hash_insert(&graph->visited_hash_set, node);
            graph->use_counts[at] = ggml_node_get_use_count(from, i);
            for (ggml_tensor *& source : node->src) {
                source = source != nullptr ? copy(source) : nullptr;
            }
        }
        graph->n_nodes = from->n_nodes;
    }

    ggml_tensor * copy(const ggml_tensor * tensor) {
        std::unique_ptr<ggml_tensor> & copy = copies[tensor];
        if (!copy) {
            copy = std::make_unique<ggml_tensor>(*tensor);
        }
        return copy.get();
    }
};

ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    const auto frozen = std::make_shared<frozen_graph>(graph);
    self(backend).queue.put([&late = self(backend), frozen] {
        if (ggml_backend_graph_compute(late.cpu.get(), frozen->graph) != GGML_STATUS_SUCCESS) {
            abort();
        }
    });
    return GGML_STATUS_SUCCESS;
}

const ggml_backend_i backend_i = {
    /* .get_name            = */ [](ggml_backend_t backend) { return late_of(backend->device).name; },
    /* .free                = */
    [](ggml_backend_t backend) {
        delete &self(backend);
        delete backend;
    },
    /* .set_tensor_async    = */
    [](ggml_backend_t backend, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
        self(backend).queue.put([to = (char *) tensor->data + offset, data, size] { memcpy(to, data, size); });
    },
    /* .get_tensor_async    = */
    [](ggml_backend_t backend, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
        self(backend).queue.put(
            [from = (const char *) tensor->data + offset, data, size] { memcpy(data, from, size); });
    },
    /* .set_tensor_2d_async = */ nullptr,
    /* .get_tensor_2d_async = */ nullptr,
    /* .cpy_tensor_async    = */ nullptr,
    /* .synchronize         = */ [](ggml_backend_t backend) { self(backend).queue.synchronize(); },
    /* .graph_plan_create   = */ nullptr,
    /* .graph_plan_free     = */ nullptr,
    /* .graph_plan_update   = */ nullptr,
    /* .graph_plan_compute  = */ nullptr,
    /* .graph_compute       = */ graph_compute,
    /* .event_record        = */
    [](ggml_backend_t backend, ggml_backend_event_t handle) { self(backend).queue.record(*(event *) handle->context); },
    /* .event_wait          = */
    [](ggml_backend_t backend, ggml_backend_event_t handle) { self(backend).queue.wait(*(event *) handle->context); },
    /* .graph_optimize      = */ nullptr,
};

ggml_guid_t guid() {
    static ggml_guid guid = { 'l', 'a', 't', 'e' };
    return &guid;
}

ggml_backend_t backend_new(ggml_backend_dev_t dev, const char *) {
    auto *     context       = new late_backend{ ggml_backend_ptr(ggml_backend_dev_init(cpu(), nullptr)) };
    const auto set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(cpu()), "ggml_backend_set_n_threads");
    set_n_threads(context->cpu.get(), 1);
    return new ggml_backend{ guid(), backend_i, dev, context };
}

// ---- device

bool no_events() {
    const char * text = getenv("LATE_EVENTS");
    return text != nullptr && strcmp(text, "none") == 0;
}

ggml_backend_event_t event_new(ggml_backend_dev_t dev) {
    static nth refused("LATE_EVENTS");
    return no_events() || refused.now() ? nullptr : new ggml_backend_event{ dev, new event };
}

const ggml_backend_device_i device_i = {
    /* .get_name             = */ [](ggml_backend_dev_t dev) { return late_of(dev).name; },
    /* .get_description      = */ [](ggml_backend_dev_t) { return "a late CPU"; },
    /* .get_memory           = */
    [](ggml_backend_dev_t, size_t * free, size_t * total) {
        *total = memory_of_all();
        *free  = *total - std::min<size_t>(taken, *total);
    },
    /* .get_type             = */ [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; },
    /* .get_props            = */
    [](ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
        props->name        = ggml_backend_dev_name(dev);
        props->description = ggml_backend_dev_description(dev);
        props->type        = GGML_BACKEND_DEVICE_TYPE_GPU;
        props->device_id   = late_of(dev).id;
        ggml_backend_dev_memory(dev, &props->memory_free, &props->memory_total);
        props->caps = {
            /* .async = */ true,
            /* .host_buffer = */ false,
            /* .buffer_from_host_ptr = */ false,
            /* .events = */ !no_events(),
        };
    },
    /* .init_backend         = */ backend_new,
    /* .get_buffer_type      = */ [](ggml_backend_dev_t dev) { return &late_of(dev).buft; },
    /* .get_host_buffer_type = */ nullptr,
    /* .buffer_from_host_ptr = */ nullptr,
    /* .supports_op          = */
    [](ggml_backend_dev_t, const ggml_tensor * op) { return ggml_backend_dev_supports_op(cpu(), op); },
    /* .supports_buft        = */
    [](ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) { return buft == &late_of(dev).buft; },
    /* .offload_op           = */ nullptr,
    /* .event_new            = */ event_new,
    /* .event_free           = */
    [](ggml_backend_dev_t, ggml_backend_event_t handle) {
        delete (event *) handle->context;
        delete handle;
    },
    /* .event_synchronize    = */
    [](ggml_backend_dev_t, ggml_backend_event_t handle) {
        event & of = *(event *) handle->context;
        of.await(of.now(false));
    },
};

ggml_backend_dev_t device_at(size_t index);

ggml_backend_reg reg = {
    /* .api_version = */ GGML_BACKEND_API_VERSION,
    /* .iface       = */
    {
        /* .get_name         = */ [](ggml_backend_reg_t) { return "LATE"; },
        /* .get_device_count = */ [](ggml_backend_reg_t) { return (size_t) std::max(knob("LATE_DEVICES"), 1l); },
        /* .get_device       = */ [](ggml_backend_reg_t, size_t index) { return device_at(index); },
        /* .get_proc_address = */ [](ggml_backend_reg_t, const char *) -> void * { return nullptr; },
    },
    /* .context     = */ nullptr,
};

ggml_backend_dev_t device_at(size_t index) {
    static late all[] = {
        { "LATE0", "0000:00:00.0", { device_i, &reg, nullptr }, { buft_i, nullptr, nullptr } },
        { "LATE1", "0000:00:00.1", { device_i, &reg, nullptr }, { buft_i, nullptr, nullptr } },
    };
    late & chosen         = all[index];
    chosen.device.context = chosen.buft.context = &chosen;
    chosen.buft.device                          = &chosen.device;
    return &chosen.device;
}

} // namespace

// ---- link

static thread_local std::string last_error; // several threads use one link

struct rotary_link {
    stream           queue{ 2 };
    stream           beside{ 4 }; // for prefetches
    event            wanted, predicted;
    std::minstd_rand chance{ 3 };
    long             n_asked = 0;

    bool ask(std::function<void()> what) {
        const long fail = knob("LATE_FAIL");
        n_asked         = fail > 0 ? n_asked + 1 : 0;
        if (fail > 0 && n_asked == fail) {
            last_error = "the link is broken";
            return false;
        }
        queue.put(std::move(what));
        return true;
    }
};

static void * link_pin(rotary_link *, void * memory, size_t bytes, rotary_pin how) {
    const char *      text   = getenv("LATE_LOCK");
    const std::string refuse = text != nullptr ? text : "";
    if (refuse == "none" || refuse == "new" || (refuse == "default" && how == ROTARY_PIN_READ_ONLY)) {
        last_error = "operation not supported";
        return nullptr;
    }
    if (!known.add(memory, bytes)) {
        last_error = "part or all of it is page-locked already";
        return nullptr;
    }
    return memory;
}

static bool link_copy(rotary_link * link, void * to, const void * from, size_t bytes) {
    if (!known.has(to, bytes) || !known.has(from, bytes)) {
        last_error = "a copy would wait, for memory that is not page-locked";
        return false;
    }
    return link->ask([to, from, bytes] { memcpy(to, from, bytes); });
}

static void * link_host_new(rotary_link *, size_t bytes, void ** on_device) {
    static nth   refused("LATE_NEW");
    const char * text = getenv("LATE_LOCK");
    if ((text != nullptr && strcmp(text, "none") == 0) || refused.now()) {
        last_error = "out of memory";
        return nullptr;
    }
    *on_device = malloc(bytes);
    known.add(*on_device, bytes);
    return *on_device;
}

static void copy_piece(const rotary_link_layer & layer, const rotary_page & page, int32_t index) {
    const rotary_link_piece piece = rotary_link_piece_of(layer, page, index);
    memcpy(piece.to, piece.from, piece.bytes);
}

static void score(const rotary_link_prediction & next) {
    const int32_t n = next.layer.table.n_expert;
    for (int32_t index = 0; index < n * next.n_tokens; index++) {
        const float * state = next.copy + index / n * next.n_embd;
        float         sum   = next.bias != nullptr ? next.bias[index % n] : 0;
        for (int32_t i = 0; i < next.n_embd; i++) {
            sum += next.router[index % n * next.n_embd + i] * next.scale[i] * state[i];
        }
        next.scores[index] = next.selection != nullptr ? 1 / (1 + expf(-sum)) + next.selection[index % n] : sum;
    }
}

// Copy pieces one by one until the predicted lookup comes.
static void copy_ahead(const rotary_link_layer & layer, uint64_t number) {
    rotary_page_state & state  = *layer.table.state;
    const uint32_t      all    = layer.table.n_pieces * state.n_prefetches;
    const long          most   = knob("LATE_PIECES");
    const auto          wanted = [&] {
        return __atomic_load_n(&state.demanded, __ATOMIC_ACQUIRE) >= number;
    };
    for (long n_copied = 0; state.n_begun < all && !wanted(); n_copied++) {
        while (most > 0 && n_copied >= most && !wanted()) {
            std::this_thread::sleep_for(std::chrono::microseconds(20));
        }
        if (!wanted()) {
            const uint32_t index = state.n_begun++;
            copy_piece(layer, layer.table.prefetches[index / layer.table.n_pieces],
                       (int32_t) index % layer.table.n_pieces);
        }
    }
}

static bool link_look_up(rotary_link * link, const rotary_link_lookup * lookup, const rotary_link_prediction * next) {
    if (lookup->predicted) {
        link->queue.put(
            [now = *lookup] { __atomic_store_n(&now.layer.table.state->demanded, now.number, __ATOMIC_RELEASE); });
        link->queue.wait(link->predicted);
    }
    static const int32_t         wild_id = -7;
    const rotary_link_prediction none    = {};
    const bool                   wild    = getenv("LATE_WILD") != nullptr;
    const bool                   on = link->ask([link, wild, now = *lookup, ahead = next != nullptr ? *next : none] {
        for (int32_t i = 0; i < ahead.n_embd * ahead.n_tokens; i++) {
            ahead.copy[i] = ((const float *) (ahead.state + ahead.stride * (i / ahead.n_embd)))[i % ahead.n_embd];
        }
        const rotary_page_table & table    = now.layer.table;
        const rotary_page_ids     wild_ids = { (const char *) &wild_id, now.ids.n_used, now.ids.n_tokens, 0, 0 };
        rotary_page_resolve(rotary_page_alone{}, table, wild ? wild_ids : now.ids, now.slot_ids);
        std::vector<rotary_page> pages(table.pages, table.pages + table.state->n_pages);
        std::shuffle(pages.begin(), pages.end(), link->chance);
        for (const rotary_page & page : pages) {
            for (int32_t i = page.first; i < table.n_pieces; i++) {
                copy_piece(now.layer, page, i);
            }
        }
    });
    if (on && next != nullptr) {
        link->queue.record(link->wanted);
        link->beside.wait(link->wanted);
        link->beside.put([ahead = *next] {
            score(ahead);
            rotary_page_predict(rotary_page_alone{}, ahead.layer.table, ahead.scores, ahead.n_tokens, ahead.n_used);
            copy_ahead(ahead.layer, ahead.number);
        });
        link->beside.record(link->predicted);
    }
    return on;
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const rotary_link_api * rotary_link_get(void) {
    static const rotary_link_api api = {
        /* .abi         = */ ROTARY_LINK_ABI,
        /* .kind        = */ "LATE",
        /* .open        = */
        [](const char *, char * error, size_t size) -> rotary_link * {
            if (getenv("LATE_OPEN") != nullptr) {
                snprintf(error, size, "no stream");
                return nullptr;
            }
            return new rotary_link;
        },
        /* .close       = */ [](rotary_link * link) { delete link; },
        /* .error       = */ [](const rotary_link *) { return last_error.c_str(); },
        /* .pin         = */ link_pin,
        /* .unpin       = */ [](rotary_link *, void * memory) { known.remove(memory); },
        /* .host_new    = */ link_host_new,
        /* .host_free   = */
        [](rotary_link *, void * memory) {
            known.remove(memory);
            free(memory);
        },
        /* .wait        = */
        [](rotary_link * link, void * handle) {
            link->queue.wait(*(event *) handle);
            return true;
        },
        /* .record      = */
        [](rotary_link * link, void * handle) {
            link->queue.record(*(event *) handle);
            return true;
        },
        /* .copy        = */ link_copy,
        /* .look_up     = */ link_look_up,
        /* .synchronize = */
        [](rotary_link * link) {
            link->queue.synchronize();
            link->beside.synchronize();
            return true;
        },
    };
    return &api;
}

EXPORT ggml_backend_reg_t ggml_backend_init(void) {
    return &reg;
}
