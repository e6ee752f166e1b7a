// SPDX-License-Identifier: MIT
//
// Eviction policy of one layer: picks the victim when a slot is needed. Pure logic, one policy per file, chosen by
// name. A policy sees every routing of its layer, and every expert that enters or leaves a slot.
// Threading: none of its own; the owner of the slot table locks.

#pragma once

#include "rotary.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace rotary {

class policy {
  public:
    virtual ~policy() = default;

    // A routing, ids[n_tokens][n_used] with the router's weights or NULL. Called before any of its experts enters.
    virtual void note(const int32_t * ids, const float * weights, int32_t n_used, int32_t n_tokens) = 0;

    // An expert enters a slot, or is evicted. `wanted` is false for an expert that was prefetched and is not used yet.
    virtual void enter(int32_t /* expert */, bool /* wanted */) {}
    virtual void leave(int32_t /* expert */) {}

    // The layer has this many slots from now on.
    virtual void resize(int32_t /* n_slots */) {}

    virtual bool wants_weights() const { return false; }

    // The victim among these resident experts, which are in the order of their slots; never empty.
    virtual int32_t choose(const std::vector<int32_t> & candidates) = 0;

    // This policy as a device can run it (page_table.h); NULL if it cannot.
    virtual class valued_policy * on_device() { return nullptr; }
};

// A policy that keeps a value for each expert, resident or not; the victim is the expert of the lowest value.
class valued_policy : public policy {
  public:
    explicit valued_policy(int32_t n_expert) : value(n_expert, 0.0) {}

    int32_t choose(const std::vector<int32_t> & candidates) override;

    std::vector<double> value;      // [n_expert]
    double              clock  = 0; // growth 0: number of uses so far; else what a use adds to its expert's value
    double              growth = 0; // factor on what a use adds, per token; 0: a value is the number of the last use
    double              unused_value = 0; // value of the last expert that was prefetched and not used; counts down

  protected:
    void scale_down(double max_clock); // divide clock and values by it if clock has grown beyond it
};

class routing_history; // recall.cpp

struct policy_setting {
    int32_t                          n_expert;
    int32_t                          n_slots;
    int32_t                          layer; // index among the paged layers
    int32_t                          il;    // the model's layer number
    std::shared_ptr<routing_history> history;
    const rotary_policy *            own;   // or NULL
};

// Each is defined in the file of its name.
std::unique_ptr<policy> lru_new(const policy_setting & setting);
std::unique_ptr<policy> lfu_new(const policy_setting & setting);
std::unique_ptr<policy> weighted_new(const policy_setting & setting);
std::unique_ptr<policy> sieve_new(const policy_setting & setting);
std::unique_ptr<policy> s3fifo_new(const policy_setting & setting);
std::unique_ptr<policy> arc_new(const policy_setting & setting);
std::unique_ptr<policy> recall_new(const policy_setting & setting);
std::unique_ptr<policy> own_new(const policy_setting & setting); // the caller's; needs setting.own

// The setting's own policy if it has one, else the policy of this name; NULL if the name is not known.
std::unique_ptr<policy> policy_new(const std::string & name, const policy_setting & setting);
const char *            policy_name_of(const std::string & name); // the name as a static string; "" if not known
const char *            policy_names();                           // "lru,lfu,..."
bool                    policy_known(const std::string & name);
std::string             policy_not_known(const std::string & name);
std::shared_ptr<routing_history> routing_history_new(int32_t n_layers); // for all policies of one model

// "auto" is the best policy that can run where lookups are resolved: recall has to see every routing on the host.
static constexpr const char * automatic_policy = "auto";
static constexpr const char * best_policy      = "recall";
static constexpr const char * best_on_device   = "lfu";

} // namespace rotary
