-- Take ids out of whatever set of a queue they may stand in, RQ's and ours, except those of what runs. Returns whether
-- one of them waited in a set, and so not in the queue's list.
local function leave_registries(queue, ...)
  for _, name in ipairs({ KEY.finished, KEY.failed, KEY.canceled, KEY.deadlines }) do
    redis.call('ZREM', name .. queue, ...)
  end
  local aside = 0
  for _, name in ipairs({ KEY.scheduled, KEY.deferred, KEY.retries, KEY.suspects }) do
    aside = aside + redis.call('ZREM', name .. queue, ...)
  end
  redis.call('SREM', KEY.bounced .. queue, ...)
  return aside > 0
end
