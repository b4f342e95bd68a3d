-- The id stands in at most one of RQ's registries. Returns whether it waited in a set, and not in its queue's list.
local function leave_registries(queue, id)
  for _, name in ipairs({ KEY.finished, KEY.failed, KEY.canceled }) do redis.call('ZREM', name .. queue, id) end
  redis.call('ZREM', KEY.deadlines .. queue, id)
  local aside = 0
  for _, name in ipairs({ KEY.scheduled, KEY.deferred, KEY.retries, KEY.suspects }) do
    aside = aside + redis.call('ZREM', name .. queue, id)
  end
  redis.call('SREM', KEY.bounced .. queue, id)
  return aside > 0
end
